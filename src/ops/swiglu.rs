//! SwiGLU: silu(gate) * up, silu(x) = x / (1 + e^-x).

use super::lanes::{Body, Isa, Kernel, LANES, store_part, widen_part};
use super::parallel::filled;
use super::storage::slice;
#[cfg(feature = "cuda")]
use super::{cuda, kernels};
use crate::error::Result;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor};

/// `gate_up` `[T, 2 * inter]` f32, the gate in the first half of each row, to silu(gate) * up `[T, inter]`.
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    Ok(gate_up.apply_op1_no_bwd(&Swiglu { body: Body::best() })?)
}

/// The gradient of `gate_up` `[T, 2 * inter]` from that of [`swiglu`]'s result, `dy` `[T, inter]`, both f32.
///
/// With s = 1 / (1 + e^-gate): d gate = dy up s (1 + gate (1 - s)), d up = dy gate s.
pub fn swiglu_backward(gate_up: &Tensor, dy: &Tensor) -> Result<Tensor> {
    Ok(gate_up.apply_op2_no_bwd(dy, &SwigluGradient { body: Body::best() })?)
}

/// silu(gate) * up, number by number, to `out`.
pub(super) fn products(gate: &[f32], up: &[f32], out: &mut [f32]) {
    Body::best().run(Row { gate, up, out });
}

struct Swiglu {
    body: Body,
}

impl CustomOp1 for Swiglu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, gate_up: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, double) = layout.shape().dims2()?;
        if double % 2 != 0 {
            candle_core::bail!("swiglu: a row holds a gate and as many values, not {double} numbers");
        }
        let width = double / 2;
        let gate_up: &[f32] = slice("swiglu", gate_up, layout)?;
        let out = filled(rows * width, width, |row, out| {
            let (gate, up) = gate_up[row * double..][..double].split_at(width);
            self.body.run(Row { gate, up, out });
        });
        Ok((CpuStorage::F32(out), Shape::from((rows, width))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, gate_up: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let (rows, double) = layout.shape().dims2()?;
        let (device, dtype, width) = (&gate_up.device, cuda::dtype("swiglu", gate_up)?, double / 2);
        let out = cuda::output(device, dtype, rows * width)?;
        let addresses = [cuda::base("swiglu", &out)?, cuda::address("swiglu", gate_up, layout, dtype)?];
        cuda::launch(device, &kernels::swiglu(dtype, addresses, [rows, width]))?;
        Ok((out, Shape::from((rows, width))))
    }
}

struct SwigluGradient {
    body: Body,
}

impl CustomOp2 for SwigluGradient {
    fn name(&self) -> &'static str {
        "swiglu gradient"
    }

    fn cpu_fwd(
        &self,
        gate_up: &CpuStorage,
        layout: &Layout,
        dy: &CpuStorage,
        dy_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, width) = dy_layout.shape().dims2()?;
        if layout.dims() != [rows, 2 * width] {
            candle_core::bail!("{}: {:?} from {:?}", self.name(), layout.dims(), dy_layout.dims());
        }
        let gate_up: &[f32] = slice(self.name(), gate_up, layout)?;
        let dy: &[f32] = slice(self.name(), dy, dy_layout)?;
        let out = filled(gate_up.len(), 2 * width, |row, out: &mut [f32]| {
            let (gate, up) = gate_up[row * 2 * width..][..2 * width].split_at(width);
            let (d_gate, d_up) = out.split_at_mut(width);
            self.body.run(GradientRow { gate, up, dy: &dy[row * width..][..width], d_gate, d_up });
        });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}

struct GradientRow<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    dy: &'a [f32],
    d_gate: &'a mut [f32],
    d_up: &'a mut [f32],
}

impl Kernel for GradientRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let one = isa.splat(1.0);
        let inputs = self.gate.chunks(LANES).zip(self.up.chunks(LANES)).zip(self.dy.chunks(LANES));
        let outputs = self.d_gate.chunks_mut(LANES).zip(self.d_up.chunks_mut(LANES));
        for (((gate, up), dy), (d_gate, d_up)) in inputs.zip(outputs) {
            let (gate, up, dy) = (widen_part(isa, gate), widen_part(isa, up), widen_part(isa, dy));
            let share = isa.div(one, isa.add(one, isa.exp(isa.sub(isa.splat(0.0), gate))));
            let slope = isa.mul(share, isa.fma(gate, isa.sub(one, share), one));
            store_part(isa, isa.mul(isa.mul(dy, up), slope), d_gate);
            store_part(isa, isa.mul(dy, isa.mul(gate, share)), d_up);
        }
    }
}

struct Row<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let inputs = self.gate.chunks(LANES).zip(self.up.chunks(LANES));
        for ((gate, up), out) in inputs.zip(self.out.chunks_mut(LANES)) {
            store_part(isa, silu_times(isa, widen_part(isa, gate), widen_part(isa, up)), out);
        }
    }
}

#[inline(always)]
fn silu_times<I: Isa>(isa: I, gate: I::V, up: I::V) -> I::V {
    let one = isa.splat(1.0);
    let decay = isa.exp(isa.sub(isa.splat(0.0), gate));
    isa.mul(isa.div(gate, isa.add(one, decay)), up)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::ops::samples::{check_bits, check_close, differences, floats, tensor};

    fn naive(x: &Tensor) -> Vec<f64> {
        let width = x.dim(1).unwrap() / 2;
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let row = |row: &[f32]| (0..width).map(|i| silu(row[i].into()) * f64::from(row[width + i])).collect::<Vec<_>>();
        floats(x).chunks(2 * width).flat_map(row).collect()
    }

    #[test]
    fn gradients_are_those_of_differences() {
        for width in [1, 7, 16, 33] {
            let (x, dy) = ((tensor(1, (5, 2 * width)) * 5.0).unwrap(), tensor(2, (5, width)));
            let got = floats(&swiglu_backward(&x, &dy).unwrap());
            check_close(&format!("width {width}"), &got, &differences(&x, naive, &floats(&dy)), 2e-4);
            for body in Body::all() {
                check_bits("body", &floats(&x.apply_op2_no_bwd(&dy, &SwigluGradient { body }).unwrap()), &got);
            }
        }
        assert!(swiglu_backward(&tensor(1, (2, 6)), &tensor(1, (2, 4))).is_err());
    }

    #[test]
    fn values_are_those_of_the_formula_and_the_same_bits_on_every_body() {
        for width in [1, 7, 16, 17, 100] {
            let x = (tensor(width as u64, (5, 2 * width)) * 20.0).unwrap();
            let got = floats(&swiglu(&x).unwrap());
            check_close(&format!("width {width}"), &got, &naive(&x), 1e-4);
            for body in Body::all() {
                check_bits("body", &floats(&x.apply_op1_no_bwd(&Swiglu { body }).unwrap()), &got);
            }
            let last = floats(&swiglu(&x.narrow(0, 4, 1).unwrap()).unwrap());
            check_bits("one row", &last, &got[4 * width..]);
        }
    }

    #[test]
    fn wrong_inputs_are_errors() {
        assert!(swiglu(&tensor(1, (2, 5))).is_err());
        assert!(swiglu(&tensor(1, (6, 4)).t().unwrap()).is_err());
    }
}
