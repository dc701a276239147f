//! `warren function` and `warren trigger` against a control plane with the real compiler.

#[path = "../../control/tests/fake/mod.rs"]
mod fake;

use std::process::Output;

use fake::World;
use fake::functions::{compiler, component};
use serde_json::{Value, json};

async fn warren(world: &World, words: &[&str]) -> Output {
    tokio::process::Command::new(env!("CARGO_BIN_EXE_warren"))
        .args(words)
        .env("WARREN_ENDPOINT", world.endpoint().to_string())
        .output()
        .await
        .unwrap()
}

/// Standard output of a command that must succeed.
async fn done(world: &World, line: &str) -> String {
    let words: Vec<_> = line.split_whitespace().collect();
    let output = warren(world, &words).await;
    assert!(output.status.success(), "{line}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

async fn read(world: &World, line: &str) -> Value {
    serde_json::from_str(&done(world, &format!("{line} --output json")).await).unwrap()
}

/// Exit code and standard error of a command that must fail.
async fn failed(world: &World, line: &str) -> (i32, String) {
    let words: Vec<_> = line.split_whitespace().collect();
    let output = warren(world, &words).await;
    assert!(!output.status.success(), "{line}: {output:?}");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

async fn world() -> World {
    let mut world = World::new().await;
    world.functions.compiler = Some(compiler());
    world.stop_control().await;
    world.start_control().await;
    world.create_vpc("blue").await;
    world
}

#[tokio::test]
async fn a_function_is_deployed_named_led_to_and_removed() {
    let world = world().await;
    let file = |name: &str, contents: &[u8]| {
        let path = world.file(name);
        std::fs::write(&path, contents).unwrap();
        path.display().to_string()
    };
    let app = file("app.wasm", &component(""));
    let text = file("text", b"hello");
    let deploy = format!("function deploy web {app} --vpc blue");
    let first = read(&world, &deploy).await;
    assert_eq!((&first["function"], &first["version"]), (&json!("web"), &json!(1)));
    let more = "--memory 64 --timeout 500ms --env A=b --env C= --concurrency 7 --init-snapshot";
    let second = read(&world, &format!("{deploy} {more} --file etc/text={text}")).await;
    assert_eq!((&second["version"], &second["compiled_before"]), (&json!(2), &json!(true)));

    let shown = read(&world, "function show web").await;
    assert_eq!(shown[0]["memory_bytes"], 64 << 20);
    assert_eq!((&shown[0]["timeout_ms"], &shown[0]["concurrency"]), (&json!(500), &json!(7)));
    assert_eq!(
        (&shown[1]["template"], &shown[1]["concurrency"]),
        (&json!("runtime"), &Value::Null)
    );
    let digest = second["package"].as_str().unwrap();
    let package = std::fs::read(world.file("functions").join(&digest[..2]).join(digest)).unwrap();
    let package = warren_function::package::Package::parse(&package).unwrap();
    assert_eq!(package.contents(&package.manifest.files[0]), b"hello");
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    assert_eq!(package.manifest.environment, [pair("A", "b"), pair("C", "")]);
    assert!(package.manifest.initialise);

    done(&world, "function alias set web live 1").await;
    let alias = done(&world, "function alias set web live 1=9 2").await;
    assert_eq!(alias, "ALIAS  VERSIONS  BEFORE\nlive   1=9 2=1   1\n");
    let rolled = read(&world, "function alias rollback web live").await;
    assert_eq!(rolled["versions"], json!([{ "version": 1, "weight": 1 }]));
    assert_eq!(read(&world, "function alias ls web").await[0]["name"], "live");
    let listed = done(&world, "function ls --vpc blue").await;
    assert!(listed.contains("web   blue  2       2         live"), "{listed}");
    assert_eq!(read(&world, "function ls --vpc red").await, json!([]));

    let add =
        "trigger add http site --function web --alias live --host a.example --prefix /x --strip";
    done(&world, add).await;
    done(&world, "trigger add event lost --function web").await;
    done(&world, "trigger add event mail --function web --backoff 2s --dead-letter lost").await;
    let cron = ["trigger", "add", "timer", "nightly", "--function", "web", "--cron", "0 3 * * *"];
    assert!(warren(&world, &cron).await.status.success());
    assert_eq!(
        done(&world, "trigger ls --function web").await,
        "NAME     KIND   CALLS                                 FUNCTION  ALIAS\n\
         lost     event  2 retries from 1000 ms on             web       $LATEST\n\
         mail     event  2 retries from 2000 ms on, then lost  web       $LATEST\n\
         nightly  timer  0 3 * * *                             web       $LATEST\n\
         site     http   a.example/x, stripped                 web       live\n"
    );
    let triggers = read(&world, "trigger ls").await;
    let site = json!({
        "name": "site", "function": "web", "alias": "live",
        "kind": "http", "host": "a.example", "prefix": "/x", "strip": true,
    });
    assert_eq!(triggers[3], site);

    for line in ["function rm web", "function alias rm web live", "trigger rm lost"] {
        assert_eq!(failed(&world, line).await.0, 1, "{line}");
    }
    let removed = read(&world, "trigger rm site mail lost nightly").await;
    assert_eq!(removed.as_array().unwrap().len(), 4);
    done(&world, "function alias rm web live").await;
    done(&world, "function rm web").await;
    assert_eq!(failed(&world, "function show web").await.0, 4);
}

#[tokio::test]
async fn what_cannot_be_deployed_is_told_with_reason_and_exit_code() {
    let world = world().await;
    let bad = world.file("bad.wasm");
    std::fs::write(&bad, component("(import \"a:b/c\" (instance))")).unwrap();
    let bad = bad.display();
    let (code, error) = failed(&world, &format!("function deploy web {bad} --vpc blue")).await;
    assert!(code == 2 && error.contains("the component imports a:b/c"), "{code} {error}");
    let (code, _) = failed(&world, &format!("function deploy web {bad} --vpc red")).await;
    assert_eq!(code, 4);
    let (code, error) = failed(&world, "function deploy web /nowhere.wasm --vpc blue").await;
    assert!(code == 2 && error.contains("/nowhere.wasm"), "{code} {error}");
    let (code, error) = failed(&world, "trigger add timer t --function web --cron 1").await;
    assert!(code == 2 && error.contains("write five fields"), "{code} {error}");
}

#[tokio::test]
async fn a_new_function_needs_no_control_plane() {
    let directory = tempfile::tempdir().unwrap();
    let folder = directory.path().join("counter").display().to_string();
    let new = async |lang: &str| {
        tokio::process::Command::new(env!("CARGO_BIN_EXE_warren"))
            .args(["function", "new", "--lang", lang, &folder])
            .env("WARREN_ENDPOINT", "unix:/nowhere.sock")
            .output()
            .await
            .unwrap()
    };
    let made = new("rust").await;
    assert!(made.status.success(), "{made:?}");
    assert!(String::from_utf8_lossy(&made.stdout).contains("counter/src/lib.rs"), "{made:?}");
    assert!(directory.path().join("counter/Cargo.toml").exists());
    let again = new("c").await;
    assert_eq!(again.status.code(), Some(2), "{again:?}");
    assert!(String::from_utf8_lossy(&again.stderr).contains("is not empty"), "{again:?}");
}
