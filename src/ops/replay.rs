//! Steps in which every sequence has one new row, recorded as a graph on a GPU and replayed: launching their operations one by one takes
//! longer than the smaller ones run. A CPU has nothing to record.

#[cfg(feature = "cuda")]
use std::collections::HashMap;

use candle_core::{Device, Tensor};

use super::attention::inputs::{Inputs, Integers};
#[cfg(feature = "cuda")]
use super::{attention::inputs::LaidOut, cuda::graph::Graph};
use crate::error::Result;

/// Recorded steps that are kept; beyond it all are forgotten. Buckets up to 256 rows and contexts of 32,768 are about as many.
#[cfg(feature = "cuda")]
const STEPS_MAX: usize = 128;

/// Rows and positions that a step is laid out for: its own or a few more, so that few layouts serve all steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Room {
    /// Rows, those included that fill up the batch.
    pub rows: usize,
    /// Positions of the longest context.
    pub context: usize,
}

impl Room {
    /// The smallest room for `rows` rows and contexts of up to `context` positions.
    pub fn of(rows: usize, context: usize) -> Self {
        // 1, 2, 4, 8, and two sizes to each power of two above.
        let step = (rows.next_power_of_two() / 4).max(1);
        let rows = if rows <= 8 { rows.next_power_of_two() } else { rows.next_multiple_of(step) };
        Self { rows, context: super::kernels::splits(context).next_power_of_two() * super::kernels::SPLIT_LEN }
    }
}

/// The recorded steps of one model.
#[derive(Debug)]
pub struct Replays {
    heads: [usize; 2],
    device: Device,
    replayed: u64,
    #[cfg(feature = "cuda")]
    steps: HashMap<Room, Step>,
}

/// What is known of the steps that need one room.
#[cfg(feature = "cuda")]
#[derive(Debug)]
enum Step {
    /// There was one, with this result.
    Seen(Tensor),
    /// Where its integers are read and where its result is written, each time.
    Recorded { words: Tensor, result: Tensor, graph: Graph },
    /// It could not be recorded, or there was no memory for it.
    Refused,
}

impl Replays {
    /// For a model of `heads` query heads and key heads on `device`; None on a CPU.
    pub fn new(heads: [usize; 2], device: &Device) -> Option<Self> {
        (!device.is_cpu()).then(|| Self {
            heads,
            device: device.clone(),
            replayed: 0,
            #[cfg(feature = "cuda")]
            steps: HashMap::new(),
        })
    }

    /// Steps that were replayed so far.
    pub fn replayed(&self) -> u64 {
        self.replayed
    }

    /// The result of `work` on `integers`: u32, of a shape that depends on `room` alone. Every sequence has one row, and there are as many
    /// as `room` has. `work` asks the same of the device whatever the integers are, and neither waits for it nor copies from or to the
    /// host. The first step of a room is done as any other, for what is loaded or chosen at first sight cannot be recorded; the second is
    /// recorded. The result is good until the next call.
    ///
    /// # Errors
    /// Of `work`, and if there is no memory left.
    pub fn run(
        &mut self,
        integers: Integers<'_>,
        room: Room,
        work: impl Fn(&Inputs<'_>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if self.device.is_cuda() {
            return self.run_on(integers, room, work);
        }
        let _ = room;
        work(&Inputs::new(integers, self.heads, &self.device)?)
    }
}

#[cfg(feature = "cuda")]
mod recorded {
    use candle_core::cuda_backend::CudaStorageSlice;
    use candle_core::{CpuStorage, CudaStorage, InplaceOp1, InplaceOp2, Layout};

    use super::*;

    impl Replays {
        pub(super) fn run_on(
            &mut self,
            integers: Integers<'_>,
            room: Room,
            work: impl Fn(&Inputs<'_>) -> Result<Tensor>,
        ) -> Result<Tensor> {
            let laid_out = LaidOut::new(&integers, self.heads, room.context);
            let device = self.device.clone();
            let inputs = |laid_out| Inputs::of(integers, laid_out, &device);
            if self.steps.len() >= STEPS_MAX && !self.steps.contains_key(&room) {
                self.steps.clear();
            }
            match self.steps.get(&room) {
                None => {
                    let result = work(&inputs(laid_out)?)?;
                    self.steps.insert(room, Step::Seen(result.clone()));
                    Ok(result)
                }
                Some(Step::Seen(result)) => {
                    let (result, inputs) = (result.clone(), inputs(laid_out)?);
                    let recorded = Graph::record(device.as_cuda_device()?, || {
                        result.inplace_op2(&work(&inputs).map_err(candle_core::Error::wrap)?, &CopyWords)
                    });
                    match recorded.and_then(|graph| graph.launch().map(|()| graph)) {
                        Ok(graph) => {
                            let words = inputs.words.clone();
                            self.steps.insert(room, Step::Recorded { words, result: result.clone(), graph });
                            self.replayed += 1;
                            Ok(result)
                        }
                        Err(error) => self.refuse(room, &error, || work(&inputs)),
                    }
                }
                Some(Step::Recorded { words, result, graph }) => {
                    words.inplace_op1(&Fill(&laid_out.words))?;
                    match graph.launch() {
                        Ok(()) => {
                            self.replayed += 1;
                            Ok(result.clone())
                        }
                        Err(error) => self.refuse(room, &error, || work(&inputs(laid_out)?)),
                    }
                }
                Some(Step::Refused) => work(&inputs(laid_out)?),
            }
        }

        /// Steps of `room` are computed as any other from now on, if this one can be.
        fn refuse(
            &mut self,
            room: Room,
            error: &candle_core::Error,
            work: impl FnOnce() -> Result<Tensor>,
        ) -> Result<Tensor> {
            self.steps.remove(&room);
            let result = work()?;
            tracing::warn!("steps of {} rows are not replayed: {error}", room.rows);
            self.steps.insert(room, Step::Refused);
            Ok(result)
        }
    }

    /// Writes words of the host over those of a tensor.
    struct Fill<'a>(&'a [u32]);

    impl InplaceOp1 for Fill<'_> {
        fn name(&self) -> &'static str {
            "fill"
        }

        fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
            candle_core::bail!("{}: a CPU has nothing to record", self.name())
        }

        fn cuda_fwd(&self, words: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
            let device = words.device.clone();
            match &mut words.slice {
                CudaStorageSlice::U32(words) if layout.shape().elem_count() == self.0.len() => {
                    device.memcpy_htod(self.0, words)
                }
                _ => candle_core::bail!("{}: {:?} do not take {} words", self.name(), layout.dims(), self.0.len()),
            }
        }
    }

    /// Copies the words of another tensor over those of a tensor.
    struct CopyWords;

    impl InplaceOp2 for CopyWords {
        fn name(&self) -> &'static str {
            "copy words"
        }

        fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> candle_core::Result<()> {
            candle_core::bail!("{}: a CPU has nothing to record", self.name())
        }

        fn cuda_fwd(
            &self,
            to: &mut CudaStorage,
            to_layout: &Layout,
            from: &CudaStorage,
            from_layout: &Layout,
        ) -> candle_core::Result<()> {
            let device = to.device.clone();
            match (&mut to.slice, &from.slice) {
                (CudaStorageSlice::U32(to), CudaStorageSlice::U32(from)) if to_layout == from_layout => {
                    device.memcpy_dtod(from, to)
                }
                _ => candle_core::bail!("{}: {:?} over {:?}", self.name(), from_layout.dims(), to_layout.dims()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_no_smaller_than_what_is_needed_and_seldom_larger() {
        let rows = |rows| Room::of(rows, 1).rows;
        assert_eq!(
            [1, 2, 3, 5, 8, 9, 13, 16, 17, 25, 33, 49, 65, 97, 256].map(rows),
            [1, 2, 4, 8, 8, 12, 16, 16, 24, 32, 48, 64, 96, 128, 256]
        );
        let context = |context| Room::of(1, context).context;
        assert_eq!([1, 256, 257, 512, 513, 1025, 32_768].map(context), [256, 256, 512, 512, 1024, 2048, 32_768]);
        for (rows, length) in (1..=256).zip((1..).step_by(37)) {
            let room = Room::of(rows, length);
            assert!(room.rows >= rows && room.context >= length, "{rows}, {length}: {room:?}");
            assert_eq!(Room::of(room.rows, room.context), room);
        }
    }
}
