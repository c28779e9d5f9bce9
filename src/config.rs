//! What a user may set: file, environment, flags.
