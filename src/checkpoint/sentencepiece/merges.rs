//! The merge rules behind a SentencePiece BPE vocabulary, which keeps only pieces and their scores.
//!
//! SentencePiece joins, again and again, the two neighbours whose union is the piece of the highest score, the leftmost
//! on ties. Inside the characters that end up as piece P it therefore makes the very moves it makes on P alone, since
//! whatever happens around them never touches them; so P always arises from the same two halves. One rule for each
//! piece, found by encoding the piece alone, ranked by score, gives the same ids: no other rule could ever apply.

use std::collections::HashMap;

use super::proto::{Kind, Piece};
use crate::error::{Error, Result};

/// The two halves of every piece that merging can produce, first the rule that is applied first.
pub(super) fn merges<'a>(pieces: &[Piece<'a>]) -> Result<Vec<[&'a str; 2]>> {
    let scores: HashMap<&str, f32> =
        pieces.iter().filter(|piece| piece.kind == Kind::Normal).map(|piece| (piece.text, piece.score)).collect();
    check_unused(pieces)?;
    let mut rules = Vec::new();
    let mut lost = 0_usize;
    for piece in pieces.iter().filter(|piece| piece.kind == Kind::Normal) {
        let Some(split) = last_split(piece.text, &scores) else { continue };
        let halves = piece.text.split_at(split);
        if scores.contains_key(halves.0) && scores.contains_key(halves.1) {
            rules.push((piece.score, [halves.0, halves.1]));
        } else {
            lost += 1;
        }
    }
    if lost > 0 {
        return Err(Error::Unsupported(format!(
            "tokenizer.model: {lost} pieces are made of characters that are no pieces themselves; \
             supply a tokenizer.json"
        )));
    }
    // Stable: pieces of one score stay in the order of their ids.
    rules.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    if let Some(tie) = rules.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        let [a, b] = [tie[0].1.concat(), tie[1].1.concat()];
        tracing::warn!("tokenizer.model: pieces {a:?} and {b:?} have one score; texts with both may split otherwise");
    }
    Ok(rules.into_iter().map(|(_, halves)| halves).collect())
}

/// Unused pieces fill up vocabularies. SentencePiece joins even them, and takes them apart in the end; one that no two pieces make
/// never comes about and needs no rule.
fn check_unused(pieces: &[Piece<'_>]) -> Result<()> {
    let joins = |piece: &&Piece<'_>| matches!(piece.kind, Kind::Normal | Kind::Unused);
    let scores: HashMap<&str, f32> = pieces.iter().filter(joins).map(|piece| (piece.text, piece.score)).collect();
    for piece in pieces.iter().filter(|piece| piece.kind == Kind::Unused) {
        let halves = last_split(piece.text, &scores).map(|split| piece.text.split_at(split));
        if halves.is_some_and(|(left, right)| scores.contains_key(left) && scores.contains_key(right)) {
            let what = format!("the unused piece {:?} is made of two others; supply a tokenizer.json", piece.text);
            return Err(Error::Unsupported(format!("tokenizer.model: {what}")));
        }
    }
    Ok(())
}

/// Where the last merge joins two parts when `piece` alone is encoded, in bytes; `None` if no merge makes it.
fn last_split(piece: &str, scores: &HashMap<&str, f32>) -> Option<usize> {
    let mut bounds: Vec<usize> = piece.char_indices().map(|(start, _)| start).chain([piece.len()]).collect();
    let joined = |bounds: &[usize], i: usize| scores.get(&piece[bounds[i]..bounds[i + 2]]).copied();
    let pairs = bounds.len().checked_sub(2)?;
    let mut candidates: Vec<Option<f32>> = (0..pairs).map(|i| joined(&bounds, i)).collect();
    while candidates.len() > 1 {
        let mut best: Option<(usize, f32)> = None;
        for (i, score) in candidates.iter().enumerate() {
            if let Some(score) = score.filter(|score| best.is_none_or(|(_, best)| *score > best)) {
                best = Some((i, score));
            }
        }
        let (i, _) = best?;
        bounds.remove(i + 1);
        candidates.remove(i);
        for i in i.saturating_sub(1)..candidates.len().min(i + 1) {
            candidates[i] = joined(&bounds, i);
        }
    }
    bounds.get(1).copied().filter(|_| candidates.len() == 1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn pieces<'a>(scored: &[(&'a str, f32)]) -> Vec<Piece<'a>> {
        scored.iter().map(|&(text, score)| Piece { text, score, kind: Kind::Normal }).collect()
    }

    #[test]
    fn each_piece_arises_from_one_pair_in_the_order_of_scores() {
        let pieces = pieces(&[
            ("abc", -3.0),
            ("ab", -2.0),
            ("bc", -1.0),
            ("aaa", -5.0),
            ("aa", -4.0),
            ("a", -6.0),
            ("b", -7.0),
            ("c", -8.0),
            ("cab", -9.0),
            ("ca", -10.0),
            ("ba", -11.0),
            ("cba", -12.0),
        ]);
        let expected =
            [["b", "c"], ["a", "b"], ["a", "bc"], ["a", "a"], ["aa", "a"], ["c", "ab"], ["c", "a"], ["b", "a"]];
        assert_eq!(merges(&pieces).unwrap(), [&expected[..], &[["c", "ba"]]].concat());
    }

    #[test]
    fn pieces_that_merging_cannot_reach_have_no_rule() {
        let mut pieces = pieces(&[("abcd", -1.0), ("bc", -2.0), ("a", -3.0), ("b", -4.0), ("c", -5.0), ("d", -6.0)]);
        assert_eq!(merges(&pieces).unwrap(), [["b", "c"]]);
        pieces[1].kind = Kind::Control;
        assert_eq!(merges(&pieces).unwrap(), [[""; 2]; 0]);
    }

    #[test]
    fn unused_pieces_are_passed_over_unless_merging_makes_them() {
        let mut pieces = pieces(&[("ab", -1.0), ("a", -3.0), ("b", -4.0), ("[PAD6]", -5.0), ("c", -6.0), ("bc", -7.0)]);
        pieces[3].kind = Kind::Unused;
        pieces[4].kind = Kind::Unused;
        assert_eq!(merges(&pieces[..5]).unwrap(), [["a", "b"]]);
        pieces[5].kind = Kind::Unused;
        let error = merges(&pieces).unwrap_err().to_string();
        assert!(error.contains("the unused piece \"bc\" is made of two others"), "{error}");
    }

    #[test]
    fn pieces_over_unknown_characters_are_refused() {
        let error = merges(&pieces(&[("ab", -1.0), ("a", -2.0)])).unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)), "{error}");
    }
}
