//! Which tokens run next: requests, sequences, blocks, the scheduler and the thread that drives it.
//! No tensors, no text, no input or output; tested against a fake model in microseconds.

pub mod request;
pub mod step;
