//! The HTTP surface: wire types, routes and the accept loop.
