//! Commands of the operator's, which do in a cloud what Warren cannot know of. Each gets one JSON
//! object on its standard input and says by its exit status whether it was done.

use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// Most bytes of what a command says of its failure.
const SAID: usize = 512;

/// A program and its arguments, as a list in the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Vec<String>")]
pub struct Hook {
    program: PathBuf,
    arguments: Vec<String>,
}

impl TryFrom<Vec<String>> for Hook {
    type Error = &'static str;

    fn try_from(words: Vec<String>) -> Result<Self, Self::Error> {
        let mut words = words.into_iter();
        let program = PathBuf::from(words.next().unwrap_or_default());
        if !program.is_absolute() {
            return Err("a command is a list that begins with the absolute path of a program");
        }
        Ok(Self { program, arguments: words.collect() })
    }
}

/// Why a command did not do what it was to.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It cannot be started.
    #[error("{} cannot be run: {source}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It says that it failed.
    #[error("{} failed ({status}): {said}", program.display())]
    Failed {
        /// The program.
        program: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to its standard error, cut.
        said: String,
    },
    /// It takes too long, and was killed.
    #[error("{} was not done within {} s", program.display(), limit.as_secs())]
    Late {
        /// The program.
        program: PathBuf,
        /// How long it may take.
        limit: Duration,
    },
}

impl Hook {
    /// Runs the command once, for so long at most.
    ///
    /// # Errors
    /// As of [`HookError`].
    pub async fn run(&self, message: &impl Serialize, limit: Duration) -> Result<(), HookError> {
        let program = || self.program.clone();
        match tokio::time::timeout(limit, self.run_to_end(message)).await {
            Ok(done) => done,
            Err(_) => Err(HookError::Late { program: program(), limit }),
        }
    }

    async fn run_to_end(&self, message: &impl Serialize) -> Result<(), HookError> {
        let start = |source| HookError::Start { program: self.program.clone(), source };
        let text = serde_json::to_vec(message).map_err(|error| start(error.into()))?;
        let mut child = Command::new(&self.program)
            .args(&self.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // When it takes too long, this is dropped.
            .kill_on_drop(true)
            .spawn()
            .map_err(start)?;
        if let Some(mut input) = child.stdin.take() {
            // One that does not read it, need not.
            input.write_all(&text).await.ok();
        }
        let output = child.wait_with_output().await.map_err(start)?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr[..output.stderr.len().min(SAID)]);
        let (program, status) = (self.program.clone(), output.status);
        Err(HookError::Failed { program, status, said: said.trim().to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Hook {
        let words = ["/bin/sh", "-c", script].map(str::to_owned);
        Vec::from(words).try_into().unwrap()
    }

    const LIMIT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_command_gets_its_message_and_its_failure_is_told() {
        let message = serde_json::json!({ "action": "add", "count": 2 });
        shell(r#"test "$(cat)" = '{"action":"add","count":2}'"#)
            .run(&message, LIMIT)
            .await
            .unwrap();
        let failed = shell("cat > /dev/null; echo no quota >&2; exit 3").run(&message, LIMIT).await;
        let error = failed.unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.ends_with("no quota"), "{error}");
        shell("exec <&-; exit 0").run(&"x".repeat(1 << 20), LIMIT).await.unwrap();
    }

    #[tokio::test]
    async fn one_that_hangs_is_killed() {
        let late = shell("exec sleep 600").run(&(), Duration::from_millis(50)).await.unwrap_err();
        assert!(matches!(late, HookError::Late { .. }), "{late}");
        let gone = Hook { program: "/nowhere/hook".into(), arguments: vec![] };
        let error = gone.run(&(), LIMIT).await.unwrap_err().to_string();
        assert!(error.contains("/nowhere/hook cannot be run"), "{error}");
    }

    #[test]
    fn a_command_is_an_absolute_path_and_its_arguments() {
        for words in [vec![], vec!["hook"], vec![""]] {
            let words: Vec<String> = words.into_iter().map(str::to_owned).collect();
            Hook::try_from(words).unwrap_err();
        }
    }
}
