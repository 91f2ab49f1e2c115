//! A driver of the console that does anything in any order, before a reader of any speed.
#![no_main]

use devices::virtio::conformance::fuzz;
use devices::virtio::console::{Console, ConsoleOutput};
use libfuzzer_sys::fuzz_target;

/// Takes so many bytes at a time, and nothing each other time.
struct Reader {
    at_once: usize,
    ready: bool,
}

impl ConsoleOutput for Reader {
    fn write(&mut self, bytes: &[u8]) -> usize {
        self.ready = !self.ready || self.at_once > 200;
        if self.ready { bytes.len().min(self.at_once) } else { 0 }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    let size = (choice & 1 != 0).then_some((80, 25));
    let at_once = usize::from(choice);
    fuzz(Console::new(Box::new(move || Box::new(Reader { at_once, ready: true })), size), data);
});
