//! What the fuzz targets of `fuzz/` do with their input. Each gives it to one reader of strangers' bytes, and
//! panics where that reader breaks a promise.
//!
//! Compiled for the fuzzer (`--cfg fuzzing`) and for the tests, which run the kept corpora through it. A target
//! stands beside the code that it tests, in a module `fuzzing`.

use crate::{audit, config, connection, http, protocol, server};

/// A target, by the name of its corpus.
type Target = (&'static str, fn(&[u8]));

/// Every target.
const TARGETS: &[Target] = &[
    ("json", protocol::fuzzing::json),
    ("protobuf", protocol::fuzzing::protobuf),
    ("control", connection::fuzzing::control),
    ("upgrade", server::fuzzing::upgrade),
    ("forwarding", http::fuzzing::forwarding),
    ("settings", config::fuzzing::settings),
    ("spool", audit::fuzzing::spool),
    ("redaction", audit::fuzzing::redaction),
];

/// Runs a target on one input; panics where a promise is broken.
pub fn run(name: &str, input: &[u8]) {
    let target = TARGETS.iter().find(|(known, _)| *known == name);
    let (_, target) = target.expect("every binary in fuzz/fuzz_targets is in the table");
    target(input);
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, panic::catch_unwind, path::Path};

    use super::*;

    fn names(folder: &Path) -> BTreeSet<String> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        entries.map(|name| name.into_string().unwrap().trim_end_matches(".rs").to_owned()).collect()
    }

    /// The kept corpora: what the fuzzer found worth keeping, and each input that once broke a promise.
    #[test]
    fn no_kept_input_breaks_a_promise() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        for (target, run) in TARGETS {
            let inputs = names(&corpus.join(target));
            assert!(!inputs.is_empty(), "{target} has no corpus");
            for input in inputs {
                let bytes = fs::read(corpus.join(target).join(&input)).unwrap();
                let whole = catch_unwind(|| run(&bytes));
                assert!(whole.is_ok(), "fuzz/corpus/{target}/{input} breaks {target}");
            }
        }
    }

    #[test]
    fn every_target_has_a_binary_and_a_corpus() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
        let known: BTreeSet<_> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(names(&fuzz.join("fuzz_targets")), known);
        assert_eq!(names(&fuzz.join("corpus")), known);
        let manifest = fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
        for name in known {
            assert!(manifest.contains(&format!("\nname = \"{name}\"\n")), "{name}");
        }
    }
}
