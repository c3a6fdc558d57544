//! See `switchboard::fuzzing`, which has the target of this name.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| switchboard::fuzzing::run(
    env!("CARGO_BIN_NAME"),
    input
));
