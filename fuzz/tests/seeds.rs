//! The fuzzer's seeds, without a fuzzer: all of them, and each of them cut short, pass.

use std::path::Path;

use warren_fuzz::TARGETS;

#[test]
fn every_target_has_seeds_that_pass() {
    for (name, target) in TARGETS {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(name);
        let entries =
            std::fs::read_dir(&directory).unwrap_or_else(|error| panic!("{name}: {error}"));
        let seeds: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        assert!(!seeds.is_empty(), "{name} has no seeds");
        for seed in seeds {
            let bytes = std::fs::read(&seed).unwrap();
            for length in 0..=bytes.len() {
                target(&bytes[..length]);
            }
        }
    }
}
