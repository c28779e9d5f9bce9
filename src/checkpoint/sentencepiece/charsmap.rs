//! SentencePiece's precompiled character map: the length of a trie in bytes, the trie as a double array of u32 units
//! (darts-clone), and the replacements as texts that end with NUL. Checked here, because whoever walks the trie later
//! trusts its offsets.

use crate::error::{Error, Result};

/// Largest map that is read; the NFKC ones have 240 kB.
const BYTES_MAX: usize = 4 << 20;

/// A map whose trie can be walked with any text without leaving it.
pub(super) struct CharacterMap<'a> {
    units: Vec<usize>,
    replacements: &'a str,
}

impl<'a> CharacterMap<'a> {
    /// Reads the map and follows every path of its trie once.
    pub(super) fn parse(charsmap: &'a [u8]) -> Result<Self> {
        let map = Self::split(charsmap).filter(|map| map.is_sound() == Some(true));
        map.ok_or_else(|| Error::Checkpoint("tokenizer.model: its character map is damaged".to_owned()))
    }

    fn split(charsmap: &'a [u8]) -> Option<Self> {
        let (length, rest) = charsmap.split_at_checked(4)?;
        let length = u32::from_le_bytes(length.try_into().ok()?) as usize;
        let (trie, replacements) = rest.split_at_checked(length)?;
        let replacements = std::str::from_utf8(replacements).ok()?;
        if charsmap.len() > BYTES_MAX || !length.is_multiple_of(4) || trie.is_empty() {
            return None;
        }
        let units = trie.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes) as usize).collect();
        Some(Self { units, replacements })
    }

    fn is_sound(&self) -> Option<bool> {
        let mut seen = vec![false; self.units.len()];
        let mut bases = vec![offset(self.units[0])];
        while let Some(base) = bases.pop() {
            // Any byte may come next, and is looked up at `base ^ byte`.
            if base | 0xff >= self.units.len() {
                return Some(false);
            }
            if std::mem::replace(&mut seen[base], true) {
                continue;
            }
            for byte in 1..=0xff {
                let Some((next, has_leaf)) = self.step(base, byte) else { continue };
                if has_leaf && !self.replacements.is_char_boundary(value(*self.units.get(next)?)) {
                    return Some(false);
                }
                bases.push(next);
            }
        }
        Some(true)
    }

    /// From the children at `base` along `byte`: where its own children are, and whether a key ends here.
    fn step(&self, base: usize, byte: u8) -> Option<(usize, bool)> {
        let place = base ^ usize::from(byte);
        let unit = self.units[place];
        let matches = unit & ((1 << 31) | 0xff) == usize::from(byte);
        matches.then(|| (place ^ offset(unit), (unit >> 8) & 1 == 1))
    }

    /// What SentencePiece makes of `text`: at every place the longest key is replaced.
    pub(super) fn apply(&self, text: &str) -> String {
        let mut normalised = String::new();
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            match self.longest_key(rest.as_bytes()) {
                Some((length, replacement)) => {
                    normalised += replacement;
                    // Keys are texts: a key that ends within a character is a damaged map's.
                    rest = rest.get(length..).unwrap_or_default();
                }
                None => {
                    normalised.push(first);
                    rest = &rest[first.len_utf8()..];
                }
            }
        }
        normalised
    }

    fn longest_key(&self, text: &[u8]) -> Option<(usize, &str)> {
        let mut base = offset(self.units[0]);
        let mut longest = None;
        for (i, byte) in text.iter().enumerate().take_while(|(_, byte)| **byte != 0) {
            let Some((next, has_leaf)) = self.step(base, *byte) else { break };
            if has_leaf {
                let replacement = &self.replacements[value(self.units[next])..];
                longest = Some((i + 1, replacement.split('\0').next().unwrap_or_default()));
            }
            base = next;
        }
        longest
    }
}

fn offset(unit: usize) -> usize {
    (unit >> 10) << ((unit & (1 << 9)) >> 6)
}

fn value(unit: usize) -> usize {
    unit & ((1 << 31) - 1)
}

/// Standard base64 with padding, as tokenizer.json carries the map.
pub(super) fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            let value = (bits >> (18 - 6 * digit)) & 63;
            text.push(if digit <= chunk.len() { char::from(DIGITS[value as usize]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_standard() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xfb, 0xff, 0xfe]), "+//+");
    }

    #[test]
    fn the_longest_key_is_replaced() {
        let map = one_key(0, "é\0");
        assert_eq!(CharacterMap::parse(&map).ok().map(|map| map.apply("banal\0a")), Some("bénél\0é".to_owned()));
    }

    /// A trie in which "a" is a key with the value `value`; the units are those of darts-clone.
    fn one_key(value: u32, replacements: &str) -> Vec<u8> {
        let mut units = vec![0_u32; 512];
        // The root's children lie at 256 ^ byte, the value of "a" at 0 ^ 0.
        units[0] = 256 << 10;
        units[256 ^ 0x61] = (256 ^ 0x61 ^ 1) << 10 | 1 << 8 | 0x61;
        units[1] = 1 << 31 | value;
        let trie: Vec<u8> = units.iter().flat_map(|unit| unit.to_le_bytes()).collect();
        [&(2048_u32.to_le_bytes())[..], &trie, replacements.as_bytes()].concat()
    }

    #[test]
    fn every_step_through_the_trie_must_stay_inside() {
        assert!(CharacterMap::parse(&one_key(0, "é\0")).is_ok());
        assert!(CharacterMap::parse(&one_key(3, "é\0")).is_ok());
        for (value, replacements) in [(1, "é\0"), (4, "é\0"), (1 << 30, "é\0")] {
            assert!(CharacterMap::parse(&one_key(value, replacements)).is_err(), "{value}");
        }
        let sound = one_key(0, "x\0");
        for cut in 0..2052 {
            assert!(CharacterMap::parse(&sound[..cut]).is_err(), "{cut}");
        }
        let mut root_leaves = sound.clone();
        root_leaves[4..8].copy_from_slice(&(0x3ff_u32 << 10).to_le_bytes());
        assert!(CharacterMap::parse(&root_leaves).is_err());
        let mut not_text = sound;
        not_text.push(0xff);
        assert!(CharacterMap::parse(&not_text).is_err());
    }
}
