//! A line on a person's terminal that says what is waited for, and that it still is.

use std::io::IsTerminal;

use crate::streams;

/// Most characters of the text: a line that wraps could not be taken back.
const LONGEST: usize = 70;

const FRAMES: [char; 4] = ['|', '/', '-', '\\'];

/// The line; taken back when dropped.
#[derive(Debug)]
pub struct Spinner {
    turns: usize,
}

impl Spinner {
    /// A line that is not shown yet; none if there is no person.
    pub fn new() -> Option<Spinner> {
        std::io::stderr().is_terminal().then_some(Spinner { turns: 0 })
    }

    /// Shows `text`, behind a mark that turns a little with each call.
    pub fn turn(&mut self, text: &str) {
        let mut clean = String::with_capacity(text.len());
        streams::push_printable(&mut clean, text, false);
        let text: String = clean.chars().take(LONGEST).collect();
        streams::say(&format!("\r\x1b[K{} {text}", FRAMES[self.turns % FRAMES.len()]));
        self.turns += 1;
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        if self.turns > 0 {
            streams::say("\r\x1b[K");
        }
    }
}
