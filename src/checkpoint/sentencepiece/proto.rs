//! The part of SentencePiece's model file that decides ids: a protobuf message (sentencepiece_model.proto), read by
//! hand with every length checked. Unknown fields are skipped.

use crate::error::{Error, Result};

/// Largest published vocabularies have some 260,000 pieces.
const PIECES_MAX: usize = 1 << 20;
/// A piece has at most 16 characters unless the trainer was told otherwise.
const PIECE_CHARS_MAX: usize = 128;

/// How text is split into pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::checkpoint) enum Algorithm {
    Unigram,
    Bpe,
    Other,
}

/// What a piece is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::checkpoint) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// One entry of the vocabulary; its id is its place.
#[derive(Debug, Clone, Copy)]
pub(in crate::checkpoint) struct Piece<'a> {
    pub(in crate::checkpoint) text: &'a str,
    pub(in crate::checkpoint) score: f32,
    pub(in crate::checkpoint) kind: Kind,
}

/// A model file. Defaults are the message's.
#[derive(Debug)]
pub(in crate::checkpoint) struct Model<'a> {
    pub(in crate::checkpoint) pieces: Vec<Piece<'a>>,
    pub(in crate::checkpoint) algorithm: Algorithm,
    pub(in crate::checkpoint) byte_fallback: bool,
    pub(in crate::checkpoint) whitespace_as_suffix: bool,
    pub(in crate::checkpoint) charsmap: &'a [u8],
    pub(in crate::checkpoint) add_dummy_prefix: bool,
    pub(in crate::checkpoint) remove_extra_whitespaces: bool,
    pub(in crate::checkpoint) escape_whitespaces: bool,
    pub(in crate::checkpoint) has_denormalizer: bool,
}

impl<'a> Model<'a> {
    /// Reads a model and checks what SentencePiece itself insists on.
    pub(in crate::checkpoint) fn parse(bytes: &'a [u8]) -> Result<Self> {
        let mut model = Self {
            pieces: Vec::new(),
            algorithm: Algorithm::Unigram,
            byte_fallback: false,
            whitespace_as_suffix: false,
            charsmap: &[],
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
            has_denormalizer: false,
        };
        let mut fields = Fields(bytes);
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (1, Field::Bytes(piece)) => model.pieces.push(piece_of(piece)?),
                (2, Field::Bytes(trainer)) => model.read_trainer(trainer)?,
                (3, Field::Bytes(normalizer)) => model.read_normalizer(normalizer)?,
                (5, Field::Bytes(denormalizer)) => model.read_denormalizer(denormalizer)?,
                _ => {}
            }
            if model.pieces.len() > PIECES_MAX {
                return Err(damaged(format!("has more than {PIECES_MAX} pieces")));
            }
        }
        if model.pieces.is_empty() {
            return Err(damaged("has no pieces; is it a SentencePiece model?"));
        }
        model.check_bytes()?;
        Ok(model)
    }

    /// Text of the one piece for what cannot be expressed.
    pub(in crate::checkpoint) fn unknown(&self) -> Result<&'a str> {
        let mut unknown = self.pieces.iter().filter(|piece| piece.kind == Kind::Unknown);
        match (unknown.next(), unknown.next()) {
            (Some(piece), None) => Ok(piece.text),
            _ => Err(damaged("must have exactly one unknown piece")),
        }
    }

    fn read_trainer(&mut self, bytes: &'a [u8]) -> Result<()> {
        let mut fields = Fields(bytes);
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (3, Field::Number(1)) => self.algorithm = Algorithm::Unigram,
                (3, Field::Number(2)) => self.algorithm = Algorithm::Bpe,
                (3, Field::Number(_)) => self.algorithm = Algorithm::Other,
                (24, Field::Number(flag)) => self.whitespace_as_suffix = flag != 0,
                (35, Field::Number(flag)) => self.byte_fallback = flag != 0,
                _ => {}
            }
        }
        Ok(())
    }

    fn read_normalizer(&mut self, bytes: &'a [u8]) -> Result<()> {
        let mut fields = Fields(bytes);
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (2, Field::Bytes(charsmap)) => self.charsmap = charsmap,
                (3, Field::Number(flag)) => self.add_dummy_prefix = flag != 0,
                (4, Field::Number(flag)) => self.remove_extra_whitespaces = flag != 0,
                (5, Field::Number(flag)) => self.escape_whitespaces = flag != 0,
                _ => {}
            }
        }
        Ok(())
    }

    fn read_denormalizer(&mut self, bytes: &'a [u8]) -> Result<()> {
        let mut fields = Fields(bytes);
        while let Some((number, value)) = fields.next()? {
            if let (2, Field::Bytes(charsmap)) = (number, value) {
                self.has_denormalizer |= !charsmap.is_empty();
            }
        }
        Ok(())
    }

    fn check_bytes(&self) -> Result<()> {
        let mut found = [false; 256];
        for piece in self.pieces.iter().filter(|piece| piece.kind == Kind::Byte) {
            let code = piece.text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
            match code.filter(|code| code.len() == 2).map(|code| u8::from_str_radix(code, 16)) {
                Some(Ok(byte)) => found[usize::from(byte)] = true,
                _ => return Err(damaged(format!("has a byte piece that is called {:?}", piece.text))),
            }
        }
        let all = found.iter().all(|found| *found);
        if self.byte_fallback && !all {
            return Err(damaged("falls back to bytes and lacks some of the 256 byte pieces"));
        }
        Ok(())
    }
}

fn piece_of(bytes: &[u8]) -> Result<Piece<'_>> {
    let mut piece = Piece { text: "", score: 0.0, kind: Kind::Normal };
    let mut fields = Fields(bytes);
    while let Some((number, value)) = fields.next()? {
        match (number, value) {
            (1, Field::Bytes(text)) => {
                piece.text = std::str::from_utf8(text).map_err(|_| damaged("has a piece that is not UTF-8"))?;
            }
            (2, Field::Float(score)) => piece.score = score,
            (3, Field::Number(number)) => piece.kind = kind(number)?,
            _ => {}
        }
    }
    let chars = piece.text.chars().take(PIECE_CHARS_MAX + 1).count();
    if chars == 0 || chars > PIECE_CHARS_MAX {
        return Err(damaged(format!("has a piece without text, or with more than {PIECE_CHARS_MAX} characters")));
    }
    if !piece.score.is_finite() {
        return Err(damaged(format!("gives the piece {:?} the score {}", piece.text, piece.score)));
    }
    Ok(piece)
}

/// The kind of a piece by its number.
pub(in crate::checkpoint) fn kind(number: u64) -> Result<Kind> {
    Ok(match number {
        1 => Kind::Normal,
        2 => Kind::Unknown,
        3 => Kind::Control,
        4 => Kind::UserDefined,
        5 => Kind::Unused,
        6 => Kind::Byte,
        other => return Err(damaged(format!("has a piece of unknown type {other}"))),
    })
}

fn damaged(what: impl AsRef<str>) -> Error {
    Error::Checkpoint(format!("tokenizer.model {}", what.as_ref()))
}

enum Field<'a> {
    Number(u64),
    Float(f32),
    Bytes(&'a [u8]),
    Skipped,
}

/// The fields of one message, front to back.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Field::Number(self.varint()?),
            1 => self.take(8).map(|_| Field::Skipped)?,
            2 => {
                let length = self.varint()?;
                Field::Bytes(self.take(usize::try_from(length).unwrap_or(usize::MAX))?)
            }
            5 => match self.take(4)? {
                [a, b, c, d] => Field::Float(f32::from_le_bytes([*a, *b, *c, *d])),
                _ => Field::Skipped,
            },
            other => return Err(damaged(format!("is damaged: wire type {other}"))),
        };
        Ok(Some((key >> 3, value)))
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or_else(|| damaged("is damaged or cut off"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let [byte] = self.take(1)? else { break };
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(damaged("is damaged: a number has more than ten bytes"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    const MODEL: &[u8] = include_bytes!("../../../tests/fixtures/serve/reward/tokenizer.model");

    #[test]
    fn a_trained_model_is_read() {
        let model = Model::parse(MODEL).unwrap();
        assert_eq!((model.pieces.len(), model.algorithm, model.unknown().unwrap()), (512, Algorithm::Bpe, "<unk>"));
        assert!(model.byte_fallback && model.add_dummy_prefix && !model.remove_extra_whitespaces);
        let kinds = |kind| model.pieces.iter().filter(|piece| piece.kind == kind).count();
        assert_eq!((kinds(Kind::Byte), kinds(Kind::Control), kinds(Kind::Unknown)), (256, 2, 1));
        assert_eq!((model.pieces[259].score, model.pieces[260].score), (0.0, -1.0));
    }

    #[test]
    fn damaged_models_are_refused_without_a_panic() {
        let mut bytes = MODEL.to_vec();
        for place in 0..MODEL.len() {
            let _ = Model::parse(&MODEL[..place]);
            let bit = 1 << (place % 8);
            bytes[place] ^= bit;
            let _ = Model::parse(&bytes);
            bytes[place] ^= bit;
        }
    }

    #[track_caller]
    fn check_refused(bytes: &[u8], part: &str) {
        let message = Model::parse(bytes).err().map(|error| error.to_string()).unwrap();
        assert!(message.starts_with("tokenizer.model ") && message.contains(part), "{message}");
    }

    #[test]
    fn lies_are_told_by_name() {
        check_refused(b"", "no pieces");
        check_refused(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01], "cut off");
        check_refused(&[0x80; 11], "more than ten bytes");
        check_refused(&[0x0b], "wire type 3");
        check_refused(&[0x0a, 0x00], "without text");
        check_refused(&[0x0a, 0x03, 0x0a, 0x01, 0xff], "not UTF-8");
        check_refused(&[0x0a, 0x08, 0x0a, 0x01, b'a', 0x15, 0, 0, 0xc0, 0x7f], "score NaN");
        check_refused(&[0x0a, 0x05, 0x0a, 0x01, b'a', 0x18, 0x09], "unknown type 9");
        check_refused(&[0x0a, 0x05, 0x0a, 0x01, b'a', 0x18, 0x06], "byte piece");
        let falls_back = [0x0a, 0x03, 0x0a, 0x01, b'a', 0x12, 0x03, 0x98, 0x02, 0x01];
        check_refused(&falls_back, "lacks some of the 256");
    }
}
