//! Names of tensors in GGUF files and in Hugging Face's, and the order of rows that llama.cpp's converter changes.

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
const PARTS: [(&str, &str, RowOrder); 9] = [
    ("attn_norm", "input_layernorm", RowOrder::Same),
    ("attn_q", "self_attn.q_proj", RowOrder::Queries),
    ("attn_k", "self_attn.k_proj", RowOrder::Keys),
    ("attn_v", "self_attn.v_proj", RowOrder::Same),
    ("attn_output", "self_attn.o_proj", RowOrder::Same),
    ("ffn_norm", "post_attention_layernorm", RowOrder::Same),
    ("ffn_gate", "mlp.gate_proj", RowOrder::Same),
    ("ffn_up", "mlp.up_proj", RowOrder::Same),
    ("ffn_down", "mlp.down_proj", RowOrder::Same),
];

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
    let layer = name.strip_prefix("blk.").and_then(|rest| rest.strip_suffix(".weight")?.split_once('.'));
    let part = layer.and_then(|(layer, part)| Some((layer, PARTS.iter().find(|(own, ..)| *own == part)?)));
    match part {
        Some((layer, (_, part, order))) => (format!("model.layers.{layer}.{part}.weight"), *order),
        None => (name.to_owned(), RowOrder::Same),
    }
}

/// What a file calls the tensor of the Hugging Face name `name`, and how its rows lie there; None for what no file has.
pub(super) fn in_file(name: &str) -> Option<(String, RowOrder)> {
    let whole = match name {
        _ if name == EMBEDDING.1 => Some(EMBEDDING.0),
        _ if name == NORM.1 => Some(NORM.0),
        LANGUAGE_HEAD => Some("output.weight"),
        REWARD_HEAD | "score.weight" => Some("cls.output.weight"),
        _ => None,
    };
    if let Some(whole) = whole {
        return Some((whole.to_owned(), RowOrder::Same));
    }
    let (layer, part) = name.strip_prefix("model.layers.")?.strip_suffix(".weight")?.split_once('.')?;
    let (own, _, order) = PARTS.iter().find(|(_, theirs, _)| *theirs == part)?;
    Some((format!("blk.{layer}.{own}.weight"), *order))
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
            assert_eq!(in_file(&theirs), Some((own.to_owned(), order)));
        }
        assert_eq!(in_file("model.layers.0.self_attn.rotary_emb.inv_freq"), None);
        assert_eq!(name("blk.0.ffn_gate_inp.weight"), "blk.0.ffn_gate_inp.weight");
        assert_eq!(name("rope_freqs.weight"), "rope_freqs.weight");
    }
}
