//! Names of tensors in GGUF files and in Hugging Face's, and the order of rows that llama.cpp's converter changes.

pub(super) const REWARD_HEAD: &str = "regression_head.weight";
pub(super) const LANGUAGE_HEAD: &str = "lm_head.weight";

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

/// The Hugging Face name of the tensor called `name`, or its own where it has none.
pub(super) fn hugging_face(name: &str) -> (String, RowOrder) {
    let whole = match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some(LANGUAGE_HEAD),
        // llama.cpp's names for the head of a classifier, and what the checkpoints call it.
        "cls.weight" | "cls.output.weight" | "score.weight" => Some(REWARD_HEAD),
        _ => None,
    };
    if let Some(whole) = whole {
        return (whole.to_owned(), RowOrder::Same);
    }
    let layer = name.strip_prefix("blk.").and_then(|rest| rest.strip_suffix(".weight")?.split_once('.'));
    let part = layer.and_then(|(layer, part)| Some((layer, of_layer(part)?)));
    match part {
        Some((layer, (part, order))) => (format!("model.layers.{layer}.{part}.weight"), order),
        None => (name.to_owned(), RowOrder::Same),
    }
}

fn of_layer(part: &str) -> Option<(&'static str, RowOrder)> {
    Some(match part {
        "attn_norm" => ("input_layernorm", RowOrder::Same),
        "attn_q" => ("self_attn.q_proj", RowOrder::Queries),
        "attn_k" => ("self_attn.k_proj", RowOrder::Keys),
        "attn_v" => ("self_attn.v_proj", RowOrder::Same),
        "attn_output" => ("self_attn.o_proj", RowOrder::Same),
        "ffn_norm" => ("post_attention_layernorm", RowOrder::Same),
        "ffn_gate" => ("mlp.gate_proj", RowOrder::Same),
        "ffn_up" => ("mlp.up_proj", RowOrder::Same),
        "ffn_down" => ("mlp.down_proj", RowOrder::Same),
        _ => return None,
    })
}

/// The rows of `bytes` with the halves of each of `heads` heads one after the other, as the rotation of Hugging Face's models
/// wants them. The converter puts row i of the first half before row i of the second, for llama.cpp's rotation of neighbours.
/// Rows that do not divide into heads are left alone; their shape is refused later.
pub(super) fn unpermuted(bytes: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let head_rows = rows.checked_div(heads).unwrap_or(0);
    if head_rows * heads != rows || !head_rows.is_multiple_of(2) || rows == 0 || !bytes.len().is_multiple_of(rows) {
        return bytes.to_vec();
    }
    let row_bytes = bytes.len() / rows;
    let mut out = Vec::with_capacity(bytes.len());
    for row in 0..rows {
        let (head, place) = (row / head_rows, row % head_rows);
        let (half, i) = (place / (head_rows / 2), place % (head_rows / 2));
        let source = head * head_rows + 2 * i + half;
        out.extend_from_slice(&bytes[source * row_bytes..][..row_bytes]);
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
        assert_eq!(unpermuted(&file, 8, 2), expected);
        assert_eq!(unpermuted(&file, 8, 3), file);
    }

    #[test]
    fn names_are_those_of_hugging_face() {
        let name = |name: &str| hugging_face(name).0;
        assert_eq!(
            hugging_face("blk.3.attn_k.weight"),
            ("model.layers.3.self_attn.k_proj.weight".to_owned(), RowOrder::Keys)
        );
        assert_eq!(name("output.weight"), "lm_head.weight");
        assert_eq!(name("blk.0.ffn_gate_inp.weight"), "blk.0.ffn_gate_inp.weight");
        assert_eq!(name("rope_freqs.weight"), "rope_freqs.weight");
    }
}
