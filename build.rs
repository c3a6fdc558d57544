//! Compiles the protobuf schema (no protoc needed) and records the compiler's version for `app_info`.

use std::process::Command;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto/switchboard.proto");
    let schema = protox::compile(["proto/switchboard.proto"], ["proto"])?;
    prost_build::Config::new().skip_protoc_run().compile_fds(schema)?;

    let rustc = std::env::var("RUSTC")?;
    let version = Command::new(rustc).arg("--version").output()?.stdout;
    let version = String::from_utf8(version)?;
    let number = version.split_whitespace().nth(1).unwrap_or("unknown");
    println!("cargo::rustc-env=RUSTC_VERSION={number}");
    Ok(())
}
