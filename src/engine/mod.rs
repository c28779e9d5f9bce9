//! Which tokens run next: requests, sequences, blocks, the scheduler and the thread that drives it.
//! No tensors, no text, no input or output; tested against a fake model in microseconds.

pub mod blocks;
#[allow(clippy::module_inception)]
pub mod engine;
pub mod limits;
mod outbox;
pub mod request;
pub mod scheduler;
mod sequence;
pub mod step;
mod telemetry;

pub use blocks::{BlockPool, BlockTable};
pub use engine::{Engine, EngineHandle, EngineStatus};
pub use limits::Limits;
pub use request::{Event, Finish, Request, SamplingParams, ScoreRows, Task, TokenId, TokenLogProb, Usage};
pub use scheduler::{Counters, Scheduler};
pub use step::{BlockId, Chunk, Draw, Executor, Last, Outcome, Rows, SequenceId, StepOutput, StepPlan, Want};
