//! Names of tensors in GGUF files and in Hugging Face's, and the order of rows that llama.cpp's converter changes.

use crate::model::config::tensors::{GatedNames, ROUTER};

pub(in crate::checkpoint) const REWARD_HEAD: &str = "regression_head.weight";
pub(in crate::checkpoint) const LANGUAGE_HEAD: &str = "lm_head.weight";

/// How the rows of a tensor lie in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RowOrder {
    /// As in the Hugging Face tensor.
    Same,
    /// The two halves of every query head are interleaved.
    Queries,
    /// The same of every key head.
    Keys,
}

const EMBEDDING: (&str, &str) = ("token_embd.weight", "model.embed_tokens.weight");
const NORM: (&str, &str) = ("output_norm.weight", "model.norm.weight");

/// Parts of a layer in a file and in Hugging Face's models.
const PARTS: [(&str, &str, RowOrder); 10] = [
    ("attn_norm", "input_layernorm", RowOrder::Same),
    ("attn_q", "self_attn.q_proj", RowOrder::Queries),
    ("attn_k", "self_attn.k_proj", RowOrder::Keys),
    ("attn_v", "self_attn.v_proj", RowOrder::Same),
    ("attn_output", "self_attn.o_proj", RowOrder::Same),
    ("ffn_norm", "post_attention_layernorm", RowOrder::Same),
    ("ffn_gate", "mlp.gate_proj", RowOrder::Same),
    ("ffn_up", "mlp.up_proj", RowOrder::Same),
    ("ffn_down", "mlp.down_proj", RowOrder::Same),
    ("ffn_gate_inp", ROUTER, RowOrder::Same),
];

/// What a file calls the matrices of a layer's experts: with this ending all in one tensor, with a number one alone (files of 2023).
const MERGED: &str = "_exps";

/// A part of every expert, as a file names it, and its name in Hugging Face's models.
type ExpertPart = (&'static str, fn(GatedNames) -> String);
const EXPERT_PARTS: [ExpertPart; 3] =
    [("ffn_gate", |names| names.gate), ("ffn_up", |names| names.up), ("ffn_down", |names| names.down)];

/// The place of a tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct InFile {
    /// What the file calls it.
    pub(super) name: String,
    pub(super) order: RowOrder,
    /// Which part of the tensor of that name it is, where it holds all experts of a layer.
    pub(super) expert: Option<usize>,
}

/// The Hugging Face name of the tensor called `name`, or its own where it has none.
pub(super) fn hugging_face(name: &str) -> (String, RowOrder) {
    let whole = match name {
        _ if name == EMBEDDING.0 => Some(EMBEDDING.1),
        _ if name == NORM.0 => Some(NORM.1),
        "output.weight" => Some(LANGUAGE_HEAD),
        // llama.cpp's names for the head of a classifier, and what the checkpoints call it.
        "cls.weight" | "cls.output.weight" | "score.weight" => Some(REWARD_HEAD),
        _ => None,
    };
    if let Some(whole) = whole {
        return (whole.to_owned(), RowOrder::Same);
    }
    let found = layer_part(name).and_then(|(layer, part)| {
        if let Some((_, theirs, order)) = PARTS.iter().find(|(own, ..)| *own == part) {
            return Some((format!("model.layers.{layer}.{theirs}.weight"), *order));
        }
        let (part, expert) = part.split_once('.')?;
        let (_, of) = EXPERT_PARTS.iter().find(|(own, _)| *own == part)?;
        let number = expert.parse().ok().filter(|number: &usize| number.to_string() == expert)?;
        Some((format!("model.layers.{layer}.{}.weight", of(GatedNames::expert(number))), RowOrder::Same))
    });
    found.unwrap_or_else(|| (name.to_owned(), RowOrder::Same))
}

/// The Hugging Face names of the matrices of `count` experts that the tensor called `name` holds one after the other; None of others.
pub(super) fn experts(name: &str, count: usize) -> Option<Vec<String>> {
    let (layer, part) = layer_part(name)?;
    let (_, of) = EXPERT_PARTS.iter().find(|(own, _)| part.strip_suffix(MERGED) == Some(own))?;
    let name = |expert| format!("model.layers.{layer}.{}.weight", of(GatedNames::expert(expert)));
    Some((0..count).map(name).collect())
}

/// `("3", "attn_k")` of `blk.3.attn_k.weight`.
fn layer_part(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix("blk.")?.strip_suffix(".weight")?.split_once('.')
}

/// Where a file has the tensor of the Hugging Face name `name`; None for what no file has.
pub(super) fn in_file(name: &str) -> Option<InFile> {
    let whole = match name {
        _ if name == EMBEDDING.1 => Some(EMBEDDING.0),
        _ if name == NORM.1 => Some(NORM.0),
        LANGUAGE_HEAD => Some("output.weight"),
        REWARD_HEAD | "score.weight" => Some("cls.output.weight"),
        _ => None,
    };
    if let Some(whole) = whole {
        return Some(InFile { name: whole.to_owned(), order: RowOrder::Same, expert: None });
    }
    let (layer, part) = name.strip_prefix("model.layers.")?.strip_suffix(".weight")?.split_once('.')?;
    if let Some((own, _, order)) = PARTS.iter().find(|(_, theirs, _)| *theirs == part) {
        return Some(InFile { name: format!("blk.{layer}.{own}.weight"), order: *order, expert: None });
    }
    let expert = part.split('.').find_map(|word| word.parse().ok())?;
    let (own, _) = EXPERT_PARTS.iter().find(|(_, of)| of(GatedNames::expert(expert)) == part)?;
    let name = format!("blk.{layer}.{own}{MERGED}.weight");
    Some(InFile { name, order: RowOrder::Same, expert: Some(expert) })
}

/// The rows of `bytes` with the halves of each of `heads` heads one after the other, as the rotation of Hugging Face's models
/// wants them. The converter puts row i of the first half before row i of the second, for llama.cpp's rotation of neighbours.
/// Rows that do not divide into heads are left alone; their shape is refused later.
pub(super) fn unpermuted(bytes: Vec<u8>, rows: usize, heads: usize) -> Vec<u8> {
    reordered(bytes, rows, heads, |i, half, pairs| (2 * i + half, half * pairs + i))
}

/// The inverse of [`unpermuted`].
pub(super) fn permuted(bytes: Vec<u8>, rows: usize, heads: usize) -> Vec<u8> {
    reordered(bytes, rows, heads, |i, half, pairs| (half * pairs + i, 2 * i + half))
}

/// `places` gives source and target within a head of row i of a half, of `pairs` rows each.
fn reordered(
    bytes: Vec<u8>,
    rows: usize,
    heads: usize,
    places: impl Fn(usize, usize, usize) -> (usize, usize),
) -> Vec<u8> {
    let head_rows = rows.checked_div(heads).unwrap_or(0);
    if head_rows * heads != rows || !head_rows.is_multiple_of(2) || rows == 0 || !bytes.len().is_multiple_of(rows) {
        return bytes;
    }
    let (row_bytes, pairs) = (bytes.len() / rows, head_rows / 2);
    let mut out = vec![0; bytes.len()];
    for row in 0..rows {
        let (head, place) = (row / head_rows, row % head_rows);
        let (source, target) = places(place % pairs, place / pairs, pairs);
        let at = |place: usize| (head * head_rows + place) * row_bytes;
        out[at(target)..][..row_bytes].copy_from_slice(&bytes[at(source)..][..row_bytes]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_of_heads_are_put_one_after_the_other() {
        // Two heads of four rows; the file has rows 0, 2, 1, 3 of each.
        let file = [0, 2, 1, 3, 4, 6, 5, 7].map(|row: u8| [row; 3]).concat();
        let expected: Vec<u8> = (0..8).flat_map(|row| [row; 3]).collect();
        assert_eq!(unpermuted(file.clone(), 8, 2), expected);
        assert_eq!(permuted(expected, 8, 2), file);
        assert_eq!(unpermuted(file.clone(), 8, 3), file);
    }

    #[test]
    fn names_are_those_of_hugging_face() {
        let name = |name: &str| hugging_face(name).0;
        assert_eq!(
            hugging_face("blk.3.attn_k.weight"),
            ("model.layers.3.self_attn.k_proj.weight".to_owned(), RowOrder::Keys)
        );
        assert_eq!(name("output.weight"), "lm_head.weight");
        for own in
            ["output.weight", "token_embd.weight", "output_norm.weight", "blk.12.attn_q.weight", "cls.output.weight"]
        {
            let (theirs, order) = hugging_face(own);
            assert_eq!(in_file(&theirs), Some(InFile { name: own.to_owned(), order, expert: None }));
        }
        assert_eq!(in_file("model.layers.0.self_attn.rotary_emb.inv_freq"), None);
        assert_eq!(name("rope_freqs.weight"), "rope_freqs.weight");
    }

    #[test]
    fn experts_lie_one_after_the_other_or_have_tensors_of_their_own() {
        let theirs = |part: &str| format!("model.layers.7.block_sparse_moe.{part}.weight");
        assert_eq!(hugging_face("blk.7.ffn_gate_inp.weight").0, theirs("gate"));
        for (own, part) in [("ffn_gate", "w1"), ("ffn_down", "w2"), ("ffn_up", "w3")] {
            let merged = format!("blk.7.{own}_exps.weight");
            let names: Vec<String> = (0..3).map(|expert| theirs(&format!("experts.{expert}.{part}"))).collect();
            assert_eq!(experts(&merged, 3).as_deref(), Some(&names[..]));
            for (expert, name) in names.iter().enumerate() {
                let place = InFile { name: merged.clone(), order: RowOrder::Same, expert: Some(expert) };
                assert_eq!(in_file(name), Some(place));
                assert_eq!(hugging_face(&format!("blk.7.{own}.{expert}.weight")).0, *name);
            }
        }
        assert_eq!(hugging_face("blk.7.ffn_gate.03.weight").0, "blk.7.ffn_gate.03.weight");
        assert_eq!(experts("blk.7.ffn_gate.weight", 3), None);
        assert_eq!(experts("blk.7.attn_q_exps.weight", 3), None);
        assert_eq!(in_file(&theirs("experts.0.w4")), None);
    }
}
