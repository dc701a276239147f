//! Generates the `warren.v1` code. `protox` compiles the files: no `protoc` to install.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["agent", "control", "function", "log", "security", "types"]
        .map(|name| format!("warren/v1/{name}.proto"));
    let descriptors = protox::compile(files, ["."])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("warren.v1.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    println!("cargo:rerun-if-changed=warren");
    Ok(())
}
