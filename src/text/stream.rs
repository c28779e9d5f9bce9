//! Text out of a stream of tokens: whole characters only, and an end at the first stop string.
//! Which tokens come is decided elsewhere.

use std::collections::VecDeque;
use std::sync::Arc;

use super::detokenize::{Joined, Joiner, Start};
use super::tokenizer::{SpecialText, Tokenizer};

/// Whether the stop string that ended a text is part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopText {
    /// The text ends with the stop string.
    Keep,
    /// The text ends before the stop string.
    Cut,
}

/// Where the first token stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    /// At the beginning of a text of its own: the leading space of SentencePiece tokenizers is cut, as `decode` does.
    Beginning,
    /// After other text: a leading space is kept, so that prompt and text can be put together.
    AfterText,
}

/// What one more token added to the text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Delta {
    /// Text that is certain now; often empty.
    pub text: String,
    /// The stop string, once it is complete. Nothing comes after it.
    pub stopped: Option<String>,
}

/// Joins tokens to text as they come. All deltas and the one of `finish` together are the decoded text of all tokens, up to
/// the stop string where there was one. Time and memory for a token do not depend on how many came before; runs of byte
/// tokens (`<0xNN>`) wait for their end, since one bad byte changes how the whole run is decoded.
#[derive(Debug)]
pub struct TextStream {
    tokenizer: Arc<Tokenizer>,
    special: SpecialText,
    stop_text: StopText,
    joiner: Joiner,
    stops: Vec<Stop>,
    /// Decoded, but perhaps the beginning of a stop string.
    held: String,
    /// Bytes decoded so far, those of `held` included.
    decoded: usize,
    /// For every token that may have to be uncounted: the text's length once it had come.
    ends: VecDeque<usize>,
    /// Tokens before those in `ends`, and the text's length with the last of them.
    settled: usize,
    settled_end: usize,
    stopped: bool,
}

impl TextStream {
    /// A stream that ends at the first of the strings in `stop` to be complete; empty strings never stop.
    /// Special tokens are hidden and the first token begins a text.
    pub fn new(tokenizer: Arc<Tokenizer>, stop: Vec<String>, stop_text: StopText) -> Self {
        let joiner = tokenizer.joiner(Start::Text);
        let stops = stop.into_iter().filter(|stop| !stop.is_empty()).map(Stop::new).collect();
        Self {
            tokenizer,
            special: SpecialText::Hide,
            stop_text,
            joiner,
            stops,
            held: String::new(),
            decoded: 0,
            ends: VecDeque::new(),
            settled: 0,
            settled_end: 0,
            stopped: false,
        }
    }

    /// Shows or hides special tokens. To be called before the first token.
    #[must_use]
    pub fn with_special(mut self, special: SpecialText) -> Self {
        self.special = special;
        self
    }

    /// Says what stands before the first token. To be called before it.
    #[must_use]
    pub fn with_position(mut self, position: Position) -> Self {
        let start = if position == Position::AfterText { Start::Middle } else { Start::Text };
        self.joiner = self.tokenizer.joiner(start);
        self
    }

    /// Adds a token. After the stop string nothing changes any more. An id that has no token (embeddings may have more rows
    /// than the tokenizer has tokens) has no text.
    pub fn push(&mut self, id: u32) -> Delta {
        if self.stopped {
            return Delta::default();
        }
        let hidden = self.special == SpecialText::Hide && self.tokenizer.is_special(id);
        let token = if hidden { None } else { self.tokenizer.token(id).ok() };
        let joined = token.map_or_else(Joined::default, |token| self.joiner.push(self.tokenizer.detokenizer(), &token));
        let mut delta = self.take_in(&joined.earlier);
        if delta.stopped.is_none() {
            self.ends.push_back(self.decoded);
            let own = self.take_in(&joined.own);
            delta.text.push_str(&own.text);
            delta.stopped = own.stopped;
        }
        self.settle();
        delta
    }

    /// Ends the stream: what was held back comes out, incomplete characters as U+FFFD. A stop string can still turn up.
    pub fn finish(&mut self) -> Delta {
        if self.stopped {
            return Delta::default();
        }
        let rest = self.joiner.finish(self.tokenizer.detokenizer());
        let mut delta = self.take_in(&rest);
        if delta.stopped.is_none() {
            delta.text.push_str(&std::mem::take(&mut self.held));
            self.stopped = true;
        }
        delta
    }

    /// Tokens that the text needs: all that were pushed, or, after a stop string, the fewest whose text reaches up to where
    /// the text ends (a run of byte tokens counts whole).
    pub fn token_count(&self) -> usize {
        self.settled + self.ends.len()
    }

    /// Takes in text that belongs to the last token in `ends` or to the one about to be added.
    fn take_in(&mut self, text: &str) -> Delta {
        let mut delta = Delta::default();
        if text.is_empty() {
            return delta;
        }
        for (index, byte) in text.bytes().enumerate() {
            // Of several that end here, the longest.
            let complete = self.stops.iter_mut().filter_map(|stop| stop.feed(byte).then_some(&stop.text));
            let Some(stop) = complete.max_by_key(|stop| stop.len()).cloned() else { continue };
            self.held.push_str(&text[..=index]);
            self.decoded += index + 1;
            self.stop(stop, &mut delta);
            return delta;
        }
        self.decoded += text.len();
        if let Some(end) = self.ends.back_mut() {
            *end = self.decoded;
        }
        self.held.push_str(text);
        let keep = match self.stop_text {
            StopText::Cut => self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0),
            StopText::Keep => 0,
        };
        let rest = self.held.split_off(self.held.len() - keep);
        delta.text = std::mem::replace(&mut self.held, rest);
        delta
    }

    fn stop(&mut self, stop: String, delta: &mut Delta) {
        let cut = if self.stop_text == StopText::Cut { stop.len() } else { 0 };
        delta.text = std::mem::take(&mut self.held);
        delta.text.truncate(delta.text.len().saturating_sub(cut));
        let end = self.decoded - cut;
        let before = self.ends.iter().take_while(|token_end| **token_end < end).count();
        let needed = if self.settled_end >= end { 0 } else { before + 1 };
        self.ends.truncate(needed);
        delta.stopped = Some(stop);
        self.stopped = true;
    }

    /// Forgets the ends of tokens whose text no stop string can cut any more.
    fn settle(&mut self) {
        let certain = self.decoded - self.held.len();
        // The last one stays: text that waits may still be added to it.
        while self.ends.len() > 1 && !self.stopped {
            let Some(end) = self.ends.pop_front_if(|end| *end <= certain) else { return };
            self.settled_end = end;
            self.settled += 1;
        }
    }
}

/// One stop string and how much of it the end of the text matches (Knuth, Morris and Pratt).
#[derive(Debug)]
struct Stop {
    text: String,
    /// For every length of a match: the longest shorter one that ends at the same byte.
    shorter: Vec<usize>,
    matched: usize,
}

impl Stop {
    fn new(text: String) -> Self {
        let bytes = text.as_bytes();
        let mut shorter = vec![0; bytes.len() + 1];
        let mut matched = 0;
        for (index, byte) in bytes.iter().enumerate().skip(1) {
            while matched > 0 && bytes[matched] != *byte {
                matched = shorter[matched];
            }
            matched += usize::from(bytes[matched] == *byte);
            shorter[index + 1] = matched;
        }
        Self { text, shorter, matched: 0 }
    }

    /// Whether the string is complete with this byte.
    fn feed(&mut self, byte: u8) -> bool {
        let bytes = self.text.as_bytes();
        while self.matched > 0 && bytes[self.matched] != byte {
            self.matched = self.shorter[self.matched];
        }
        self.matched += usize::from(bytes[self.matched] == byte);
        self.matched == bytes.len()
    }
}
