//! Rendered conversations to tokens: special tokens of the template are tokens, those that a message spells out are text.
//! Also where in the text each token comes from, which training masks need.

use std::collections::HashMap;
use std::ops::Range;

use tokenizers::{AddedToken, AddedVocabulary, OffsetType};

use super::super::chat::Rendered;
use super::{Bos, Tokenizer, no_character_left, unused_characters};
use crate::error::{Error, Result};

/// A token and the bytes of the text it stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// The token.
    pub id: u32,
    /// Bytes of the rendered text; none for what the tokenizer makes up, such as a BOS of its own.
    pub bytes: Range<usize>,
}

impl Tokenizer {
    /// Token ids of a rendered conversation: special tokens of the template are tokens, those that a message spells out are
    /// text. One BOS in front, the template's or, where this tokenizer adds BOS, its own.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_rendered(&self, rendered: &Rendered) -> Result<Vec<u32>> {
        let located = self.locate(rendered, OffsetType::None)?;
        Ok(located.into_iter().map(|token| token.id).collect())
    }

    /// The tokens of [`Self::encode_rendered`], each with its bytes of `rendered.text`.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn locate_rendered(&self, rendered: &Rendered) -> Result<Vec<Located>> {
        self.locate(rendered, OffsetType::Byte)
    }

    fn locate(&self, rendered: &Rendered, offsets: OffsetType) -> Result<Vec<Located>> {
        let begins =
            rendered.as_text.first().is_none_or(|range| range.start > 0) && self.starts_with_bos(&rendered.text);
        let leading = self.leading(Bos::Add, begins).into_iter().map(|id| Located { id, bytes: 0..0 });
        if rendered.as_text.is_empty() {
            let encoding = self.tokenise(&rendered.text, self.inner.get_added_vocabulary(), offsets)?;
            let tokens = encoding.get_ids().iter().zip(encoding.get_offsets());
            return Ok(leading
                .chain(tokens.map(|(id, (start, end))| Located { id: *id, bytes: *start..*end }))
                .collect());
        }
        // Every special token of the template is swapped for a character of its own that the text does not have, and that
        // an otherwise equal list of added tokens knows; the special ones are off in that list.
        let mut swapped = Swapped::new(&rendered.text);
        let mut end = 0;
        for range in &rendered.as_text {
            swapped.swap(self, &rendered.text, end..range.start)?;
            swapped.text.push_str(&rendered.text[range.clone()]);
            end = range.end;
        }
        swapped.swap(self, &rendered.text, end..rendered.text.len())?;
        let added = self.knowing(&swapped.of_id)?;
        let real: HashMap<u32, u32> = swapped
            .of_id
            .iter()
            .filter_map(|(id, character)| {
                Some((added.token_to_id(&character.to_string(), self.inner.get_model())?, *id))
            })
            .collect();
        let encoding = self.tokenise(&swapped.text, &added, offsets)?;
        let tokens = encoding.get_ids().iter().zip(encoding.get_offsets()).map(|(id, (start, end))| Located {
            id: real.get(id).copied().unwrap_or(*id),
            bytes: swapped.original(*start)..swapped.original(*end),
        });
        Ok(leading.chain(tokens).collect())
    }

    /// The added tokens with the special ones switched off and a character for each of those in `of_id`.
    fn knowing(&self, of_id: &[(u32, char)]) -> Result<AddedVocabulary> {
        let mut added = self.as_text.clone();
        let decoder = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        let tokens = of_id.iter().filter_map(|(id, character)| {
            let token = decoder.get(id)?;
            let flags = AddedToken::from(*character, false).normalized(false).lstrip(token.lstrip);
            Some(flags.rstrip(token.rstrip))
        });
        let tokens: Vec<AddedToken> = tokens.collect();
        added.add_tokens(tokens, self.inner.get_model(), self.inner.get_normalizer()).map_err(Error::internal)?;
        Ok(added)
    }
}

/// A text in which characters stand for special tokens, while it is taken apart.
struct Swapped {
    text: String,
    free: Box<dyn Iterator<Item = char>>,
    of_id: Vec<(u32, char)>,
    /// Places of `text` and of the original, ascending, from which on both run alike.
    places: Vec<(usize, usize)>,
}

impl Swapped {
    fn new(text: &str) -> Self {
        Self {
            text: String::with_capacity(text.len()),
            free: Box::new(unused_characters([text])),
            of_id: Vec::new(),
            places: vec![(0, 0)],
        }
    }

    fn swap(&mut self, tokenizer: &Tokenizer, text: &str, range: Range<usize>) -> Result<()> {
        let start = range.start;
        let mut end = start;
        for (found, id) in tokenizer.specials_in(&text[range.clone()]) {
            self.text.push_str(&text[end..start + found.start]);
            self.places.push((self.text.len(), start + found.start));
            let character = self.stand_in(id)?;
            self.text.push(character);
            end = start + found.end;
            self.places.push((self.text.len(), end));
        }
        self.text.push_str(&text[end..range.end]);
        Ok(())
    }

    fn stand_in(&mut self, id: u32) -> Result<char> {
        if let Some((_, character)) = self.of_id.iter().find(|(known, _)| *known == id) {
            return Ok(*character);
        }
        let character = self.free.next().ok_or_else(no_character_left)?;
        self.of_id.push((id, character));
        Ok(character)
    }

    /// The place in the original of `at`, a place in `text` that is not inside a stand-in.
    fn original(&self, at: usize) -> usize {
        let next = self.places.partition_point(|(swapped, _)| *swapped <= at);
        let (swapped, original) = self.places[next.saturating_sub(1)];
        original + (at - swapped)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::text::tokenizer::SpecialTokens;

    #[test]
    fn tokens_tile_the_text_they_stand_for() {
        let json = include_str!("../../../models/eurus-mini/policy/tokenizer.json");
        let special = SpecialTokens { bos: Some("<s>".to_owned()), eos: Some("</s>".to_owned()), ..Default::default() };
        let tokenizer = Tokenizer::from_json(json, &special).unwrap();
        let text = "<s>12 <s></s>3</s><s>+4</s>";
        for as_text in [vec![], vec![6..9, 9..13], vec![9..13, 14..18], vec![0..3, 23..27]] {
            let rendered = Rendered { text: text.to_owned(), as_text };
            let located = tokenizer.locate_rendered(&rendered).unwrap();
            let ids: Vec<u32> = located.iter().map(|token| token.id).collect();
            assert_eq!(ids, tokenizer.encode_rendered(&rendered).unwrap());
            let mut end = 0;
            for token in located {
                assert_eq!(
                    (token.bytes.start, &text[token.bytes.clone()]),
                    (end, &*tokenizer.token_text(token.id).unwrap())
                );
                end = token.bytes.end;
            }
            assert_eq!(end, text.len(), "{:?}", rendered.as_text);
        }
    }
}
