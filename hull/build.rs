//! The program begins at an entry of its own: see src/entry.rs.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bins=-Wl,--entry=hull_start");
}
