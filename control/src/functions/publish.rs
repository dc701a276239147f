//! The code manager: from an uploaded component to a stored version.
//!
//! A component is compiled by a program of its own behind walls, and made a package with its options.
//! The package goes to the region's repository and to all zones, and only then the version is stored.
//! Code depends on the component and on the compiler alone: a package that was made by this compiler
//! from the same component has it, so that another environment needs no compilation.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio_stream::{Stream, StreamExt};
use tonic::Status;
use warren_function::blocking::blocking;
use warren_function::check::{Checked, MAX_BYTES};
use warren_function::compiled::Compiled;
use warren_function::digest::Digest;
use warren_function::jailed::{JailedCompiler, JailedError};
use warren_function::options::{Options, OptionsError};
use warren_function::package::{self, Package};
use warren_function::repository::{OpenError, Published, Repository, Store as Packages};
use warren_proto::v1;
use warren_proto::v1::deploy_function_request::Part;

use super::model::{Function, Version};
use super::triggers::label;
use super::{FunctionsError, add_version, check_place};
use crate::store::{Store, StoreError, Write, decode};

/// Where it is stored which package has a component's code: `compiled/COMPONENT/COMPILER`.
const COMPILED_PREFIX: &str = "compiled/";
/// The template of functions that name none.
const TEMPLATE: &str = "runtime";
const MEMORY_BYTES: u64 = 64 << 20;
/// What 32-bit memories can have.
const MAX_MEMORY_BYTES: u64 = package::MEMORY_MAX;
const TIMEOUT_MS: u32 = 3000;
const MAX_TIMEOUT_MS: u32 = 15 * 60 * 1000;
/// A compilation takes gigabytes.
const AT_ONCE: usize = 2;
/// The next piece of an upload has this long to come.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where packages are kept, and what compiles them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The region's repository: a directory, or a URL as `s3://BUCKET/PREFIX`. Without it, the
    /// directory `functions` beside the state.
    pub repository: Option<String>,
    /// The same of each zone, by its name. Without any, hosts read the region's.
    pub zones: BTreeMap<String, String>,
    /// The program warren-compile. Without it, the one beside this program.
    pub compiler: Option<PathBuf>,
}

/// Why nothing was published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The function cannot have it.
    #[error(transparent)]
    Function(#[from] FunctionsError),
    /// The messages came in another order.
    #[error(
        "the upload is none: its first message has the options, each other one a piece of the component"
    )]
    Order,
    /// The upload is not whole.
    #[error("the upload ended early: {}", .0.message())]
    Upload(Status),
    /// It does not go on.
    #[error("the upload stopped: no piece came within {} s", PATIENCE.as_secs())]
    Slow,
    /// More than the compiler takes.
    #[error(
        "the component has more than {MAX_BYTES} bytes: strip it of debug information, or build it for size"
    )]
    TooLarge,
    /// It cannot be kept meanwhile.
    #[error(
        "the component cannot be kept in a temporary file: {0}; is the disk of the temporary directory full?"
    )]
    Spool(std::io::Error),
    /// The compiler is not there.
    #[error("the compiler {}: {source}; is it installed?", path.display())]
    Compiler {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// There is no code.
    #[error(transparent)]
    Compile(#[from] JailedError),
    /// Code and options make no package.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The region does not take it.
    #[error("the package was not published: {0}")]
    Repository(#[from] warren_function::repository::StoreError),
    /// The state failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A version that was published.
#[derive(Debug)]
pub struct Deployed {
    /// Its function.
    pub function: Function,
    /// Its number.
    pub version: u64,
    /// Nothing was compiled.
    pub compiled_before: bool,
    /// Zones without a copy, and why.
    pub zones_left_out: Vec<String>,
}

/// What is stored of a component's code.
#[derive(Serialize, Deserialize)]
struct CompiledBefore {
    /// Digest of a package that has it.
    package: String,
    checked: Checked,
}

/// The code manager.
pub struct Publisher {
    store: Arc<dyn Store>,
    region: Packages,
    repository: Repository,
    compiler: JailedCompiler,
    turns: Semaphore,
}

impl Publisher {
    /// Opens the stores of a configuration. `state` is the control plane's own file.
    pub fn open(config: &Config, state: &Path, store: Arc<dyn Store>) -> Result<Self, OpenError> {
        let beside = || state.with_file_name("functions").display().to_string();
        let at = config.repository.clone().unwrap_or_else(beside);
        let region = Packages::open("the region's repository", &at)?;
        let zone = |(name, at): (&String, &String)| {
            Ok((name.clone(), Packages::open(&format!("the repository of zone {name}"), at)?))
        };
        let zones = config.zones.iter().map(zone).collect::<Result<_, OpenError>>()?;
        let compiler = config.compiler.clone().unwrap_or_else(|| {
            // Where this program is cannot be told on a system without /proc: then it is searched for.
            let beside = std::env::current_exe().unwrap_or_default();
            beside.with_file_name("warren-compile")
        });
        Ok(Self {
            store,
            repository: Repository::new(region.clone(), zones),
            region,
            compiler: JailedCompiler::new(compiler),
            turns: Semaphore::new(AT_ONCE),
        })
    }

    /// Publishes what is uploaded.
    pub async fn deploy(
        &self,
        mut upload: impl Stream<Item = Result<v1::DeployFunctionRequest, Status>> + Unpin,
    ) -> Result<Deployed, PublishError> {
        let Some(Part::Options(options)) = next(&mut upload).await? else {
            return Err(PublishError::Order);
        };
        let wanted = Wanted::new(options)?;
        let (name, vpc) = (&wanted.name, &wanted.vpc);
        // Before it is uploaded: what is refused anyhow is refused soon.
        check_place(&*self.store, name, vpc).await?;
        let spooled = spool(&mut upload).await?;
        // Never closed. The component is in memory only when it is its turn.
        let _turn = self.turns.acquire().await;
        let component = blocking(move || read(spooled)).await.map_err(PublishError::Spool)?;
        let component = Arc::new(component);
        let (source, key) = self.key(component.clone()).await?;
        let before = self.compiled_before(&key).await?;
        let compiled_before = before.is_some();
        let compiled = match before {
            Some(compiled) => compiled,
            None => self.compiler.compile(&component).await?,
        };
        let options = wanted.options.clone();
        let checked = compiled.checked;
        let package = blocking(move || options.package(&compiled)).await?;
        let Published { digest, left_out } = self.repository.publish(package.into()).await?;
        let left_out: Vec<_> =
            left_out.into_iter().map(|(zone, error)| format!("{zone}: {error}")).collect();
        for problem in &left_out {
            tracing::warn!(function = name, problem, "a zone did not get a package");
        }
        let package = digest.to_string();
        let also = if compiled_before {
            Vec::new()
        } else {
            let package = package.clone();
            vec![Write::put(key, &CompiledBefore { package, checked })?]
        };
        let version = Version {
            package,
            source: source.to_string(),
            template: wanted.template,
            memory_bytes: wanted.options.memory_bytes,
            timeout_ms: wanted.options.timeout_ms,
            concurrency: wanted.concurrency,
            published_unix_ms: now_unix_ms(),
        };
        let (function, number) = add_version(&*self.store, name, vpc, &version, &also).await?;
        tracing::info!(function = name, version = number, "published");
        Ok(Deployed { function, version: number, compiled_before, zones_left_out: left_out })
    }

    /// The digest of a component, and under which key it is stored where its code is.
    async fn key(&self, component: Arc<Vec<u8>>) -> Result<(Digest, String), PublishError> {
        let path = self.compiler.program.clone();
        // A new release is another file: nobody needs to remember to count its version up.
        let digests = blocking(move || {
            let compiler =
                std::fs::read(&path).map_err(|source| PublishError::Compiler { path, source })?;
            Ok::<_, PublishError>((Digest::of(&component), Digest::of(&compiler)))
        });
        let (source, compiler) = digests.await?;
        Ok((source, format!("{COMPILED_PREFIX}{source}/{compiler}")))
    }

    /// The code under a key, if there is some, and its package is whole.
    async fn compiled_before(&self, key: &str) -> Result<Option<Compiled>, PublishError> {
        let Some(entry) = self.store.get(key).await? else { return Ok(None) };
        let CompiledBefore { package, checked } = decode(key, &entry.value)?;
        let Ok(digest) = package.parse() else { return Ok(None) };
        let bytes = match self.region.get(digest).await {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::warn!(%error, "code of an earlier deployment is gone: it is compiled anew");
                return Ok(None);
            }
        };
        let code = Package::parse(&bytes).ok().map(|package| package.code().to_vec());
        Ok(code.map(|code| Compiled { code, checked }))
    }
}

/// What a request asks for, with all that it leaves out.
struct Wanted {
    name: String,
    vpc: String,
    template: String,
    concurrency: u32,
    options: Options,
}

impl Wanted {
    fn new(options: v1::FunctionOptions) -> Result<Self, FunctionsError> {
        let v1::FunctionOptions {
            name,
            vpc,
            template,
            memory_bytes,
            timeout_ms,
            concurrency,
            environment,
            files,
            initialise,
            reuse,
        } = options;
        label("name", &name)?;
        let template = if template.is_empty() { TEMPLATE.to_owned() } else { template };
        label("template", &template)?;
        let memory_bytes = if memory_bytes == 0 { MEMORY_BYTES } else { memory_bytes };
        if memory_bytes > MAX_MEMORY_BYTES {
            let problem = format!("{memory_bytes} are too many: at most {MAX_MEMORY_BYTES}");
            return Err(FunctionsError::Invalid { field: "memory_bytes", problem });
        }
        let timeout_ms = if timeout_ms == 0 { TIMEOUT_MS } else { timeout_ms };
        if timeout_ms > MAX_TIMEOUT_MS {
            let problem = format!("{timeout_ms} is too long: at most {MAX_TIMEOUT_MS}");
            return Err(FunctionsError::Invalid { field: "timeout_ms", problem });
        }
        let variable = |variable: v1::EnvironmentVariable| (variable.name, variable.value);
        let file = |file: v1::FunctionFile| (file.path, file.contents);
        let options = Options {
            environment: environment.into_iter().map(variable).collect(),
            memory_bytes,
            timeout_ms,
            files: files.into_iter().map(file).collect(),
            initialise,
            reuse,
        };
        Ok(Self { name, vpc, template, concurrency, options })
    }
}

async fn next(
    upload: &mut (impl Stream<Item = Result<v1::DeployFunctionRequest, Status>> + Unpin),
) -> Result<Option<Part>, PublishError> {
    match tokio::time::timeout(PATIENCE, upload.next()).await {
        Err(_) => Err(PublishError::Slow),
        Ok(None) => Ok(None),
        Ok(Some(Err(status))) => Err(PublishError::Upload(status)),
        Ok(Some(Ok(message))) => message.part.map(Some).ok_or(PublishError::Order),
    }
}

/// Keeps the pieces of a component in a file without a name, which goes with its last reader.
async fn spool(
    upload: &mut (impl Stream<Item = Result<v1::DeployFunctionRequest, Status>> + Unpin),
) -> Result<std::fs::File, PublishError> {
    let mut file = blocking(tempfile::tempfile).await.map_err(PublishError::Spool)?;
    let mut bytes = 0;
    while let Some(part) = next(upload).await? {
        let Part::Component(piece) = part else { return Err(PublishError::Order) };
        bytes += piece.len();
        if bytes > MAX_BYTES {
            return Err(PublishError::TooLarge);
        }
        let written = blocking(move || file.write_all(&piece).map(|()| file)).await;
        file = written.map_err(PublishError::Spool)?;
    }
    Ok(file)
}

fn read(mut file: std::fs::File) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn now_unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_millis() as i64
}
