//! Which device a model lives on.
