//! The compiler in its jail: what it answers, and what it does not survive.

use std::fmt::Write;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use warren_function::check::{CheckError, MAX_BYTES};
use warren_function::compile::compile;
use warren_function::compiled::CompileError;
use warren_function::digest::Digest;
use warren_function::jailed::{JailedCompiler, JailedError, Limits};
use warren_function::options::Options;

use crate::component::component;

fn compiler() -> JailedCompiler {
    JailedCompiler::new(PathBuf::from(env!("CARGO_BIN_EXE_warren-compile")))
}

/// Enough functions for all threads of the compiler.
fn many_functions() -> Vec<u8> {
    let mut module = String::new();
    for n in 0..500 {
        write!(
            module,
            "(func $f{n} (param f64) (result f64)
                (f64.sqrt (f64.add (local.get 0) (f64.const {n}))))"
        )
        .unwrap();
    }
    component("", &module)
}

/// One function, whose values all live to its end, with a branch at each.
fn bomb(values: u32) -> Vec<u8> {
    let mut code = String::from("(func (param i32) (result i32) (local.get 0)");
    for n in 0..values {
        write!(code, "(block (br_if 0 (i32.eqz (local.get 0))) (local.set 0 (i32.const {n})))")
            .unwrap();
        write!(code, "(i32.add (local.get 0) (i32.const {n}))").unwrap();
    }
    for _ in 0..values {
        code.push_str("(i32.xor)");
    }
    code.push(')');
    component("", &code)
}

#[tokio::test]
async fn a_component_gives_the_same_package_wherever_it_is_compiled() {
    let component = many_functions();
    let here = compile(&component).unwrap();
    let jailed = compiler();
    let (one, other) = tokio::join!(jailed.compile(&component), jailed.compile(&component));
    let (one, other) = (one.unwrap(), other.unwrap());
    assert_eq!(one, here);
    assert_eq!(one, other);

    let options = Options { memory_bytes: 1 << 24, timeout_ms: 1000, ..Options::default() };
    let digest = |compiled| Digest::of(&options.clone().package(compiled).unwrap());
    assert_eq!(digest(&one), digest(&other));
}

#[test]
fn the_code_names_its_compiler_and_depends_on_the_component() {
    let one = compile(&component("", "")).unwrap().code;
    let other = compile(&component("", "(func (export \"f\"))")).unwrap().code;
    assert_ne!(one, other);
    let has = |text: &str| one.windows(text.len()).any(|bytes| bytes == text.as_bytes());
    assert!(one.starts_with(b"\x7fELF"));
    assert!(has("48") && has("x86_64-unknown-none") && has("has_avx2"));
    // Of processors beyond the baseline nothing is used.
    let flag = b"has_avx512f";
    let at = one.windows(flag.len()).position(|bytes| bytes == flag).unwrap() + flag.len();
    // A flag's value: which kind, and whether it is set.
    let on = b"has_avx2";
    let on = one.windows(on.len()).position(|bytes| bytes == on).unwrap() + on.len();
    assert_eq!(one[at], one[on]);
    assert_eq!((one[at + 1], one[on + 1]), (0, 1));
}

#[tokio::test]
async fn what_is_refused_is_refused_by_name() {
    let cases = [
        (b"garbage".to_vec(), CheckError::NotWebAssembly),
        (vec![], CheckError::NotWebAssembly),
        (wat::parse_str("(module)").unwrap(), CheckError::CoreModule),
        (vec![0; MAX_BYTES + 4096], CheckError::TooLarge(MAX_BYTES as u64 + 1)),
    ];
    for (component, expected) in cases {
        let error = compiler().compile(&component).await.unwrap_err();
        let JailedError::Refused(CompileError::Check(error)) = error else { panic!("{error:?}") };
        assert_eq!(error, expected);
    }
}

#[tokio::test]
async fn a_component_that_takes_too_long_is_ended() {
    let began = Instant::now();
    let limits = Limits { cpu_time: Duration::from_secs(1), ..compiler().limits };
    let error = JailedCompiler { limits, ..compiler() }.compile(&bomb(100_000)).await.unwrap_err();
    assert!(matches!(error, JailedError::TimedOut(limit) if limit == limits.cpu_time), "{error:?}");
    assert!(began.elapsed() < Duration::from_secs(30));

    let timeout = Duration::from_millis(300);
    let error = JailedCompiler { timeout, ..compiler() }.compile(&bomb(100_000)).await.unwrap_err();
    assert!(matches!(error, JailedError::TimedOut(limit) if limit == timeout), "{error:?}");
}

#[tokio::test]
async fn a_component_that_takes_too_much_memory_is_ended() {
    let memory_bytes = 256 << 20;
    let limits = Limits { memory_bytes, ..compiler().limits };
    let error = JailedCompiler { limits, ..compiler() }.compile(&bomb(100_000)).await.unwrap_err();
    assert!(matches!(error, JailedError::OutOfMemory(limit) if limit == memory_bytes), "{error:?}");
}

/// What becomes of a compiler that is this script.
async fn instead(directory: &Path, script: &str) -> JailedError {
    let program = directory.join("compiler");
    fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let timeout = Duration::from_millis(500);
    let compiler = JailedCompiler { timeout, ..JailedCompiler::new(program) };
    compiler.compile(&vec![0; 1 << 20]).await.unwrap_err()
}

#[tokio::test]
async fn a_compiler_that_fails_is_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let instead = |script| instead(directory.path(), script);
    assert!(matches!(instead("exec sleep 60").await, JailedError::TimedOut(_)));
    assert!(matches!(instead("kill -SYS $$").await, JailedError::Forbidden));
    assert!(matches!(instead("kill -XCPU $$").await, JailedError::TimedOut(_)));
    assert!(matches!(instead("exec echo nonsense").await, JailedError::Answer(_)));
    assert!(matches!(instead("exit 0").await, JailedError::Answer(_)));
    let JailedError::Failed { status, said } = instead("echo why >&2; exit 7").await else {
        panic!("it failed")
    };
    assert_eq!((status.code(), said.as_str()), (Some(7), "why"));
    let nowhere = JailedCompiler::new(directory.path().join("nowhere"));
    assert!(matches!(nowhere.compile(b"").await, Err(JailedError::Start { .. })));
}

#[tokio::test]
async fn the_environment_does_not_reach_the_compiler() {
    let directory = tempfile::tempdir().unwrap();
    let JailedError::Failed { said, .. } =
        instead(directory.path(), "exec >&2; env; pwd; exit 1").await
    else {
        panic!("it failed")
    };
    assert!(said.contains("MALLOC_ARENA_MAX=2"), "{said}");
    assert!(said.ends_with("\n/"), "{said}");
    assert!(!said.contains("CARGO") && !said.contains("HOME"), "{said}");
}
