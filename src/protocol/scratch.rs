//! Room to write a frame in, kept by each thread: the frame itself is then allocated once, in its size.

use std::cell::Cell;

/// Bytes of a frame that is copied out; a larger one takes the buffer with it. A thread keeps twice as many.
pub(super) const KEPT: usize = 16 * 1024;

thread_local! {
    static SCRATCH: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Lends an empty buffer.
pub(super) fn with_scratch<T>(write: impl FnOnce(&mut Vec<u8>) -> T) -> T {
    let mut scratch = SCRATCH.take();
    scratch.clear();
    let written = write(&mut scratch);
    if scratch.capacity() <= 2 * KEPT {
        SCRATCH.set(scratch);
    }
    written
}
