//! The tensors of a model by their Hugging Face names: which there are, and of which shape.

use super::{HeadKind, ModelConfig};

/// Name of the router of a layer's experts, without the layer.
pub(crate) const ROUTER: &str = "block_sparse_moe.gate";

/// Whether the tensor called `name` is the router of a layer's experts: small, and what a wrong choice comes from.
pub(crate) fn is_router(name: &str) -> bool {
    name.strip_suffix(".weight").is_some_and(|name| name.ends_with(ROUTER))
}

/// Names of the tensors of one feed-forward layer, without the layer they are in.
#[derive(Debug, Clone)]
pub(crate) struct GatedNames {
    pub(crate) gate: String,
    pub(crate) up: String,
    pub(crate) down: String,
}

impl GatedNames {
    /// Of the one that a layer has.
    pub(crate) fn only() -> Self {
        let name = |part: &str| format!("mlp.{part}_proj");
        Self { gate: name("gate"), up: name("up"), down: name("down") }
    }

    /// Of expert `index`.
    pub(crate) fn expert(index: usize) -> Self {
        let name = |part: &str| format!("block_sparse_moe.experts.{index}.{part}");
        Self { gate: name("w1"), up: name("w3"), down: name("w2") }
    }
}

impl ModelConfig {
    /// Number of weights, all tensors of [`ModelConfig::weight_shapes`] together.
    pub fn parameter_count(&self) -> u64 {
        self.checked_parameter_count().unwrap_or(u64::MAX)
    }

    /// Every tensor the checkpoint must hold: its Hugging Face name and its shape, `[out, in]` for matrices.
    pub fn weight_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab, self.hidden])];
        for layer in 0..self.layers {
            for (name, shape) in self.layer_shapes() {
                shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
            }
        }
        shapes.push(("model.norm.weight".to_owned(), vec![self.hidden]));
        if let Some(name) = self.head_tensor {
            shapes.push((name.to_owned(), vec![self.head_rows(), self.hidden]));
        }
        shapes
    }

    fn layer_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let (hidden, intermediate) = (self.hidden, self.intermediate);
        let mut shapes = vec![
            ("input_layernorm".to_owned(), vec![hidden]),
            ("self_attn.q_proj".to_owned(), vec![queries, hidden]),
            ("self_attn.k_proj".to_owned(), vec![keys, hidden]),
            ("self_attn.v_proj".to_owned(), vec![keys, hidden]),
            ("self_attn.o_proj".to_owned(), vec![hidden, queries]),
            ("post_attention_layernorm".to_owned(), vec![hidden]),
        ];
        let mut gated = |names: GatedNames| {
            shapes.push((names.gate, vec![intermediate, hidden]));
            shapes.push((names.up, vec![intermediate, hidden]));
            shapes.push((names.down, vec![hidden, intermediate]));
        };
        match self.experts {
            None => gated(GatedNames::only()),
            Some(experts) => {
                (0..experts.count).map(GatedNames::expert).for_each(gated);
                shapes.push((ROUTER.to_owned(), vec![experts.count, hidden]));
            }
        }
        shapes
    }

    fn head_rows(&self) -> usize {
        match self.head {
            HeadKind::Language => self.vocab,
            HeadKind::Reward => 1,
        }
    }

    pub(super) fn checked_parameter_count(&self) -> Option<u64> {
        let product = |shape: &[usize]| shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64));
        let mut layer = 0u64;
        for (_, shape) in self.layer_shapes() {
            layer = layer.checked_add(product(&shape)?)?;
        }
        let embedding = product(&[self.vocab, self.hidden])?;
        let head = if self.head_tensor.is_some() { product(&[self.head_rows(), self.hidden])? } else { 0 };
        let rest = embedding.checked_add(head)?.checked_add(self.hidden as u64)?;
        layer.checked_mul(self.layers as u64)?.checked_add(rest)
    }
}
