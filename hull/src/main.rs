//! Hull.
fn main() {}
