//! Where a model's weights lie, and in which type it computes there.

use super::parameter::Parameter;
use crate::error::Result;
use candle_core::{DType, Device};

/// A device, and the type of activations and caches on it.
#[derive(Debug, Clone)]
pub struct Place {
    device: Device,
    dtype: DType,
}

impl Place {
    /// For a model with this `embedding`, on `device`.
    pub fn new(device: &Device, embedding: &Parameter) -> Self {
        let stored = (!embedding.is_quantized()).then(|| embedding.value().dtype());
        Self { device: device.clone(), dtype: Self::dtype_on(device, stored) }
    }

    /// The type that a model computes in on `device` whose embedding is stored in `stored`, None if quantised. A CPU widens weights of
    /// any type as it reads them and computes in f32. A GPU computes in one type: that of the embedding, or else bf16.
    pub fn dtype_on(device: &Device, stored: Option<DType>) -> DType {
        if device.is_cpu() { DType::F32 } else { stored.unwrap_or(DType::BF16) }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The type of activations and caches.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// `weight`, from the host's memory to this place. What has to be converted is converted before it goes.
    ///
    /// # Errors
    /// If there is no memory left.
    pub fn put(&self, weight: Parameter) -> Result<Parameter> {
        if self.device.is_cpu() {
            let contiguous = weight.is_quantized() || weight.value().is_contiguous();
            return if contiguous { Ok(weight) } else { Ok(weight.value().contiguous()?.into()) };
        }
        let value = if weight.is_quantized() { weight.dequantized()? } else { weight.value().clone() };
        Ok(value.to_dtype(self.dtype)?.contiguous()?.to_device(&self.device)?.into())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::ops::quantized::{Format, Matrix, quantize};
    use crate::ops::samples::{check_bits, floats, tensor};

    #[test]
    fn a_cpu_takes_weights_as_they_are() {
        let weight = Parameter::from(tensor(1, (3, 4)).to_dtype(DType::BF16).unwrap());
        let place = Place::new(&Device::Cpu, &weight);
        assert_eq!((place.dtype(), place.put(weight).unwrap().value().dtype()), (DType::F32, DType::BF16));
        let turned = tensor(1, (3, 4)).t().unwrap();
        assert!(place.put(turned.into()).unwrap().value().is_contiguous());
    }

    #[test]
    fn a_quantised_weight_can_be_widened() {
        let (rows, k) = (5, 64);
        let numbers = floats(&tensor(1, (rows, k)));
        let blocks = quantize(Format::Q8_0, &numbers);
        let matrix = Matrix { format: Format::Q8_0, rows, k };
        let weight = Parameter::quantized(matrix, &blocks, &Device::Cpu).unwrap();
        let ids = candle_core::Tensor::from_vec((0..rows as u32).collect::<Vec<_>>(), rows, &Device::Cpu).unwrap();
        let expected = crate::ops::embed::embed(&ids, &weight).unwrap();
        check_bits("rows", &floats(&weight.dequantized().unwrap()), &floats(&expected));
    }
}
