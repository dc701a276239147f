//! Asks the compiler, a process of its own behind walls (`jail`): components are somebody
//! else's, and a compiler is large.
//!
//! It gets the component on its standard input, to the end of it, and answers on its standard output
//! with code or error in postcard's encoding. Options and files of a function it never sees.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use crate::compiled::{CompileError, Compiled};

/// The longest answer, in bytes.
const MAX_ANSWER: u64 = 1 << 30;

/// The most that is read of what the compiler says when it fails, in bytes.
const MAX_SAID: u64 = 4096;

/// How many pools of memory threads may have: each takes address space.
const POOLS: &str = "2";

/// What the compiler's process may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Address space, in bytes. Threads take some of it that they do not touch.
    pub memory_bytes: u64,
    /// Time of processors, all threads together, in whole seconds.
    pub cpu_time: Duration,
}

/// A compiler in a jail.
#[derive(Clone, Debug)]
pub struct JailedCompiler {
    /// Where the program `warren-compile` is.
    pub program: PathBuf,
    /// What each compilation may use.
    pub limits: Limits,
    /// The longest that each may take.
    pub timeout: Duration,
}

/// Why there is no code.
#[derive(Debug, thiserror::Error)]
pub enum JailedError {
    /// The component is refused.
    #[error(transparent)]
    Refused(#[from] CompileError),
    /// It takes too long.
    #[error(
        "to compile the component takes more than {0:?}: make it smaller, above all its largest functions"
    )]
    TimedOut(Duration),
    /// It takes too much memory.
    #[error(
        "to compile the component takes more than {0} bytes of memory: make it smaller, above all its largest functions"
    )]
    OutOfMemory(u64),
    /// It did what no compiler does.
    #[error(
        "the compiler was ended at a forbidden system call: the component may be an attack; tell us of it if it is not"
    )]
    Forbidden,
    /// It ended otherwise.
    #[error(
        "the compiler failed ({status}): {said}; deploy another build of the component, and tell us of this one"
    )]
    Failed {
        /// How it ended.
        status: ExitStatus,
        /// What it said, cut to some kilobytes.
        said: String,
    },
    /// It answered what is no answer.
    #[error("the compiler's answer cannot be read: is {} of this release?", .0.display())]
    Answer(PathBuf),
    /// It cannot be started, or asked.
    #[error("the compiler {}: {source}; is it installed?", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl JailedCompiler {
    /// The compiler with limits that large components keep within: 4 GiB, 3 minutes of a processor,
    /// and 5 in all, for there may be others. An interpreter with its library, 13 MB, takes 1 GiB and
    /// half a minute; one function that is made for it can take any time.
    pub fn new(program: PathBuf) -> Self {
        let limits = Limits { memory_bytes: 4 << 30, cpu_time: Duration::from_mins(3) };
        Self { program, limits, timeout: Duration::from_mins(5) }
    }

    /// Compiles a component. If this is dropped, the compiler is killed.
    ///
    /// # Errors
    /// [`JailedError`].
    pub async fn compile(&self, component: &[u8]) -> Result<Compiled, JailedError> {
        let start = |source| JailedError::Start { program: self.program.clone(), source };
        let mut command = Command::new(&self.program);
        command
            .arg("--memory-bytes")
            .arg(self.limits.memory_bytes.to_string())
            .arg("--cpu-seconds")
            .arg(self.limits.cpu_time.as_secs().to_string())
            .env_clear()
            .env("MALLOC_ARENA_MAX", POOLS)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(start)?;
        let asked = tokio::time::timeout(self.timeout, ask(&mut child, component)).await;
        let Ok(asked) = asked else {
            child.kill().await.map_err(start)?;
            return Err(JailedError::TimedOut(self.timeout));
        };
        let (status, answer, said) = asked.map_err(start)?;
        if !status.success() {
            return Err(self.failure(status, &said));
        }
        let answer: Result<Compiled, CompileError> =
            postcard::from_bytes(&answer).map_err(|_| JailedError::Answer(self.program.clone()))?;
        Ok(answer?)
    }

    /// What the compiler's end means.
    fn failure(&self, status: ExitStatus, said: &[u8]) -> JailedError {
        let said = String::from_utf8_lossy(said).trim().to_owned();
        let signal = status.signal().and_then(|signal| Signal::try_from(signal).ok());
        match signal {
            Some(Signal::SIGSYS) => JailedError::Forbidden,
            Some(Signal::SIGXCPU) => JailedError::TimedOut(self.limits.cpu_time),
            // So says Rust's library before it aborts.
            _ if said.contains("memory allocation of") => {
                JailedError::OutOfMemory(self.limits.memory_bytes)
            }
            _ => JailedError::Failed { status, said },
        }
    }
}

/// Gives the component, and takes how it ended, its answer, and what else it said.
async fn ask(child: &mut Child, component: &[u8]) -> io::Result<(ExitStatus, Vec<u8>, Vec<u8>)> {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let give = async {
        if let Some(mut stdin) = stdin {
            // One that ended early says by its end why.
            let _ = stdin.write_all(component).await;
        }
    };
    let ((), answer, said) = tokio::join!(give, take(stdout, MAX_ANSWER), take(stderr, MAX_SAID));
    Ok((child.wait().await?, answer?, said?))
}

async fn take(stream: Option<impl AsyncRead + Unpin>, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        stream.take(most).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}
