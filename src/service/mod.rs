//! The use cases, free of HTTP: generate, score, best of n.
