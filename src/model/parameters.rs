//! The weights of a model by their Hugging Face names: which are trained, and their low-rank corrections.
//! The decoder stacks some tensors of a checkpoint into one; here they are rows of one parameter with several names.

use std::ops::Range;

use super::Model;
use super::decoder::Layer;
use super::heads::Head;
use crate::error::Result;
use crate::ops::linear::Linear;
use crate::ops::linear::adapter::Adapter;
use crate::ops::parameter::{Parameter, Precision};

/// A tensor of the checkpoint that is part of a parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Its name, `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Its rows of the parameter.
    pub rows: Range<usize>,
}

/// A parameter and the tensors it is made of, in the order of its rows.
#[derive(Debug, Clone)]
pub struct NamedParameter {
    /// One, or several that the decoder reads in one pass.
    pub parts: Vec<Part>,
    /// The weight; shares its storage with the model.
    pub parameter: Parameter,
}

/// The two matrices of a correction.
pub struct LowRank {
    /// `[rank, in]`
    pub a: Parameter,
    /// `[out, rank]`
    pub b: Parameter,
    /// What their product is multiplied by.
    pub scale: f32,
}

impl Model {
    /// Every parameter, in the order of the layers; a head that shares the embedding is not listed again.
    /// Corrections are named as PEFT names them, without its prefix: `model.layers.0.self_attn.q_proj.lora_A.weight`.
    pub fn parameters(&self) -> Vec<NamedParameter> {
        let mut all = Vec::new();
        let mut single = |name: String, parameter: &Parameter| {
            let rows = 0..parameter.value().dims().first().copied().unwrap_or(0);
            all.push(NamedParameter { parts: vec![Part { name, rows }], parameter: parameter.clone() });
        };
        single("model.embed_tokens.weight".to_owned(), &self.decoder.embedding);
        for (index, layer) in self.decoder.layers.iter().enumerate() {
            let prefix = format!("model.layers.{index}");
            single(format!("{prefix}.input_layernorm.weight"), &layer.attention_norm);
            single(format!("{prefix}.post_attention_layernorm.weight"), &layer.mlp_norm);
        }
        single("model.norm.weight".to_owned(), &self.decoder.norm);
        if let Some(name) = self.config.head_tensor {
            single(name.to_owned(), self.head.linear().weight());
        }
        for (index, layer) in self.decoder.layers.iter().enumerate() {
            for (parts, linear) in layer.linears(index).into_iter().zip(layer.each()) {
                all.push(NamedParameter { parts: parts.clone(), parameter: linear.weight().clone() });
                all.extend(corrections(&parts, linear));
            }
        }
        all
    }

    /// Makes every weight a trained one, in float32.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn train(&mut self) -> Result<()> {
        let train = |parameter: &mut Parameter| -> Result<()> {
            *parameter = Parameter::trained(parameter.value())?;
            Ok(())
        };
        train(&mut self.decoder.embedding)?;
        train(&mut self.decoder.norm)?;
        for layer in &mut self.decoder.layers {
            train(&mut layer.attention_norm)?;
            train(&mut layer.mlp_norm)?;
            for linear in layer.each_mut() {
                train(linear.weight_mut())?;
            }
        }
        match self.config.head_tensor {
            Some(_) => self.train_head(),
            None => {
                *self.head.linear_mut().weight_mut() = self.decoder.embedding.clone();
                Ok(())
            }
        }
    }

    /// Computes the products of all linear layers in `precision`; norms, rotations, attention and sums stay float32.
    pub fn compute_in(&mut self, precision: Precision) {
        let set = |linear: &mut Linear| {
            let weight = linear.weight_mut();
            *weight = weight.clone().computed_in(precision);
        };
        self.decoder.layers.iter_mut().flat_map(Layer::each_mut).for_each(set);
        set(self.head.linear_mut());
    }

    /// Lays bf16 weights of linear layers out for products in bf16, as [`Linear::pack`]; a head that is the embedding stays as it is.
    /// Returns how many weights that were.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn pack(&mut self) -> Result<usize> {
        let own_head = self.config.head_tensor.map(|_| self.head.linear_mut());
        let linears = self.decoder.layers.iter_mut().flat_map(Layer::each_mut).chain(own_head);
        linears.map(Linear::pack).try_fold(0, |count, packed| Ok(count + usize::from(packed?)))
    }

    /// Makes the weight of a head that is no embedding a trained one.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn train_head(&mut self) -> Result<()> {
        let weight = self.head.linear_mut().weight_mut();
        *weight = Parameter::trained(weight.value())?;
        Ok(())
    }

    /// Puts a correction on every linear layer of the decoder for whose tensor `make` gives one, by name and shape `(out, in)`.
    ///
    /// # Errors
    /// Those of `make`, or if its matrices do not fit.
    pub fn adapt(&mut self, mut make: impl FnMut(&str, (usize, usize)) -> Result<Option<LowRank>>) -> Result<()> {
        for (index, layer) in self.decoder.layers.iter_mut().enumerate() {
            let all_parts = layer.linears(index);
            for (parts, linear) in all_parts.iter().zip(layer.each_mut()) {
                let width = linear.dims()?.1;
                let mut adapters = Vec::new();
                for part in parts {
                    if let Some(LowRank { a, b, scale }) = make(&part.name, (part.rows.len(), width))? {
                        adapters.push(Adapter::new(part.rows.clone(), a, b, scale)?);
                    }
                }
                if !adapters.is_empty() {
                    *linear = Linear::Adapted(linear.weight().clone(), adapters);
                }
            }
        }
        Ok(())
    }

    /// Adds every correction to the weight it corrects.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn merge(&mut self) -> Result<()> {
        for layer in &mut self.decoder.layers {
            for linear in layer.each_mut() {
                if let Linear::Adapted(weight, adapters) = linear {
                    let start = weight.value().clone();
                    let merged = adapters.iter().try_fold(start, |weight, adapter| adapter.merged(&weight))?;
                    *linear = Linear::dense(merged)?;
                }
            }
        }
        Ok(())
    }
}

impl Head {
    fn linear(&self) -> &Linear {
        match self {
            Self::Language(head) => &head.linear,
            Self::Reward(head) => &head.linear,
        }
    }

    fn linear_mut(&mut self) -> &mut Linear {
        match self {
            Self::Language(head) => &mut head.linear,
            Self::Reward(head) => &mut head.linear,
        }
    }
}

impl Layer {
    fn each(&self) -> impl Iterator<Item = &Linear> {
        [&self.qkv, &self.output].into_iter().chain(self.mlp.each())
    }

    fn each_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        [&mut self.qkv, &mut self.output].into_iter().chain(self.mlp.each_mut())
    }

    /// What [`Layer::each`] are made of, for layer `index`.
    fn linears(&self, index: usize) -> Vec<Vec<Part>> {
        let parts = |sizes: Vec<(String, usize)>| {
            let mut first = 0;
            let part = |(name, count): (String, usize)| {
                let rows = first..first + count;
                first = rows.end;
                Part { name: format!("model.layers.{index}.{name}.weight"), rows }
            };
            sizes.into_iter().map(part).collect()
        };
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let output = self.output.dims().map_or(0, |(rows, _)| rows);
        let qkv = [("q", q), ("k", kv), ("v", kv)].map(|(name, rows)| (format!("self_attn.{name}_proj"), rows));
        let attention = [qkv.into(), vec![("self_attn.o_proj".to_owned(), output)]];
        attention.into_iter().chain(self.mlp.names()).map(parts).collect()
    }
}

/// The matrices of the corrections to the tensors `parts` of `linear`.
fn corrections(parts: &[Part], linear: &Linear) -> Vec<NamedParameter> {
    let Linear::Adapted(_, adapters) = linear else { return Vec::new() };
    let mut all = Vec::new();
    for adapter in adapters {
        let Some(part) = parts.iter().find(|part| part.rows == *adapter.outputs()) else { continue };
        let base = part.name.trim_end_matches(".weight");
        for (matrix, parameter) in ["lora_A", "lora_B"].into_iter().zip(adapter.matrices()) {
            let rows = 0..parameter.value().dims().first().copied().unwrap_or(0);
            let part = Part { name: format!("{base}.{matrix}.weight"), rows };
            all.push(NamedParameter { parts: vec![part], parameter: parameter.clone() });
        }
    }
    all
}
