//! Load tools for Switchboard.
fn main() {}
