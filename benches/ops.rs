//! Micro-benchmarks of the operations.
fn main() {}
