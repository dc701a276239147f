//! A host's packages: all those of the tenants that live on it, in a directory of a bounded size.
//!
//! Below the directory each tenant has one, with a file for each package, whose name is its digest.
//! Tenants share no files: what one deploys tells nobody else anything. A package becomes a tenant's
//! by a rename, when it is whole; what a crash leaves of others is in `.incoming`, and goes when the
//! cache is opened. Each load is verified, so nothing needs to be flushed to the disk.

mod ledger;

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use futures_util::future::{BoxFuture, Shared, WeakShared, ready};
use futures_util::{FutureExt, StreamExt, stream};
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

use crate::blocking::blocking;
use crate::digest::Digest;
use crate::repository::{Repository, StoreError};
use ledger::{Key, Ledger};

/// Where packages are until they are whole.
const INCOMING: &str = ".incoming";

/// How many packages are fetched at a time for one tenant: each is in memory meanwhile.
const AT_ONCE: usize = 4;

/// How much of a file is read at a time, in bytes.
const CHUNK: usize = 256 << 10;

/// Why a package cannot be loaded. Those who waited for it together share it.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// A tenant's name cannot be a directory's.
    #[error(
        "{0:?} cannot be a tenant's name here: it has 1 to 128 letters, digits, and inner - _ ."
    )]
    Tenant(String),
    /// It is larger than the cache.
    #[error(
        "the package {digest} has {bytes} bytes, and the host's cache only {limit}: make the cache larger"
    )]
    TooLarge {
        /// Which.
        digest: Digest,
        /// Its size, in bytes.
        bytes: u64,
        /// The cache's, in bytes.
        limit: u64,
    },
    /// Nobody can give it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The directory fails.
    #[error("the cache of packages: {}: {source}; has the disk room, and may this process write there?", path.display())]
    Directory {
        /// What was to be read or written.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn directory(path: &Path) -> impl Fn(io::Error) -> CacheError {
    move |source| CacheError::Directory { path: path.to_owned(), source }
}

/// Where packages come from that the host does not have.
#[derive(Clone, Debug)]
pub struct Source {
    /// The repository.
    pub repository: Repository,
    /// The host's zone.
    pub zone: String,
}

/// A package that was verified. It can be mapped as long as this or the mapping lives, also when it
/// is evicted.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The file, open for reading; its position means nothing.
    pub file: Arc<File>,
    /// Its length, in bytes.
    pub bytes: u64,
}

type Loading = Shared<BoxFuture<'static, Result<Loaded, Arc<CacheError>>>>;
type WeakLoading = WeakShared<BoxFuture<'static, Result<Loaded, Arc<CacheError>>>>;

/// The packages of a host.
#[derive(Clone)]
pub struct Cache {
    shelf: Arc<Shelf>,
    source: Source,
    /// Loads in progress: who wants the same waits for the same.
    loading: Arc<Mutex<HashMap<Key, WeakLoading>>>,
}

impl Cache {
    /// Opens the cache in a directory, which is made if it is not there, for so many bytes of
    /// packages. What is there already is kept, as far as there is room.
    ///
    /// # Errors
    /// [`CacheError::Directory`].
    pub fn open(path: &Path, limit_bytes: u64, source: Source) -> Result<Self, CacheError> {
        let shelf = Shelf::open(path, limit_bytes)?;
        Ok(Self { shelf: Arc::new(shelf), source, loading: Arc::default() })
    }

    /// A tenant's package: from the directory, or from the zone if it is not there or is damaged.
    /// Whoever asks for one that somebody else is waiting for waits with them.
    ///
    /// # Errors
    /// [`CacheError`].
    pub async fn get(&self, tenant: &str, digest: Digest) -> Result<Loaded, Arc<CacheError>> {
        let key = Key { tenant: tenant.to_owned(), digest };
        check_tenant(tenant)?;
        self.join(key).await
    }

    fn join(&self, key: Key) -> Loading {
        let mut loading = lock(&self.loading);
        if let Some(loading) = loading.get(&key).and_then(WeakShared::upgrade) {
            return loading;
        }
        // Those that are done are no use any more.
        loading.retain(|_, loading| loading.upgrade().is_some());
        let load = load(Arc::clone(&self.shelf), self.source.clone(), key.clone());
        let load = load.map(|loaded| loaded.map_err(Arc::new)).boxed().shared();
        if let Some(weak) = load.downgrade() {
            loading.insert(key, weak);
        }
        load
    }

    /// Makes these the packages that the host has of a tenant: gets those that are missing, and
    /// removes others. Answers which of them it could not get, and why.
    ///
    /// # Errors
    /// [`CacheError::Tenant`].
    pub async fn keep(
        &self,
        tenant: &str,
        digests: &BTreeSet<Digest>,
    ) -> Result<Vec<(Digest, Arc<CacheError>)>, CacheError> {
        check_tenant(tenant)?;
        self.shelf.retain(tenant, digests);
        let gets = digests.iter().map(|&digest| async move {
            self.get(tenant, digest).await.err().map(|error| (digest, error))
        });
        let failed = stream::iter(gets).buffer_unordered(AT_ONCE).filter_map(ready);
        Ok(failed.collect().await)
    }

    /// How many bytes of packages there are.
    pub fn bytes(&self) -> u64 {
        lock(&self.shelf.ledger).bytes()
    }
}

/// Panics of others leave accounts that are right: nothing in between can panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn check_tenant(name: &str) -> Result<(), CacheError> {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let outer = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = name.as_bytes();
    let is_one = bytes.len() <= 128
        && bytes.iter().copied().all(inner)
        && outer(bytes.first())
        && outer(bytes.last());
    if is_one { Ok(()) } else { Err(CacheError::Tenant(name.to_owned())) }
}

async fn load(shelf: Arc<Shelf>, source: Source, key: Key) -> Result<Loaded, CacheError> {
    let (there, wanted) = (Arc::clone(&shelf), key.clone());
    if let Some(loaded) = blocking(move || there.read(&wanted)).await? {
        return Ok(loaded);
    }
    let package = source.repository.get(&source.zone, key.digest).await?;
    blocking(move || shelf.add(&key, &package)).await
}

/// The directory and its accounts. Files come and go while the accounts are locked.
struct Shelf {
    path: PathBuf,
    limit: u64,
    ledger: Mutex<Ledger>,
}

impl Shelf {
    fn open(path: &Path, limit: u64) -> Result<Self, CacheError> {
        let incoming = path.join(INCOMING);
        match fs::remove_dir_all(&incoming) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(directory(&incoming)(error));
            }
            _ => fs::create_dir_all(&incoming).map_err(directory(&incoming))?,
        }
        let shelf = Self { path: path.to_owned(), limit, ledger: Mutex::new(Ledger::new(limit)) };
        let mut found = shelf.files()?;
        found.sort_by_key(|(_, _, used)| *used);
        for (key, bytes, _) in found {
            let mut ledger = lock(&shelf.ledger);
            if bytes > limit {
                shelf.discard(&mut ledger, &key);
            } else {
                shelf.account(&mut ledger, &key, bytes);
            }
        }
        Ok(shelf)
    }

    /// The packages that are there, their lengths, and when they were used last.
    fn files(&self) -> Result<Vec<(Key, u64, SystemTime)>, CacheError> {
        let mut found = Vec::new();
        for tenant in list(&self.path)? {
            let Ok(name) = tenant.file_name().into_string() else { continue };
            if check_tenant(&name).is_err() {
                continue;
            }
            for package in list(&tenant.path())? {
                let key = package.file_name().to_str().and_then(|digest| {
                    Some(Key { tenant: name.clone(), digest: digest.parse().ok()? })
                });
                let file = package.metadata().map_err(directory(&package.path()))?;
                let used = file.modified().map_err(directory(&package.path()))?;
                found.extend(key.map(|key| (key, file.len(), used)));
            }
        }
        Ok(found)
    }

    fn file(&self, key: &Key) -> PathBuf {
        self.path.join(&key.tenant).join(key.digest.to_string())
    }

    /// The package, if it is there and whole; it goes if it is not whole.
    fn read(&self, key: &Key) -> Result<Option<Loaded>, CacheError> {
        let path = self.file(key);
        let file = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(directory(&path))?,
        };
        let loaded = verify(&file, key.digest).map_err(directory(&path))?;
        let mut ledger = lock(&self.ledger);
        let Some(bytes) = loaded else {
            tracing::warn!(tenant = key.tenant, digest = %key.digest, "a package in the host's cache is damaged: it is fetched anew");
            self.discard(&mut ledger, key);
            return Ok(None);
        };
        ledger.touch(key);
        // For the order after a restart; without it that is only less good.
        let _ = file.set_modified(SystemTime::now());
        Ok(Some(Loaded { file: Arc::new(file), bytes }))
    }

    /// Makes this the key's package, and room for it.
    fn add(&self, key: &Key, package: &Bytes) -> Result<Loaded, CacheError> {
        let bytes = package.len() as u64;
        if bytes > self.limit {
            return Err(CacheError::TooLarge { digest: key.digest, bytes, limit: self.limit });
        }
        let incoming = self.path.join(INCOMING);
        let mut whole = NamedTempFile::new_in(&incoming).map_err(directory(&incoming))?;
        whole.write_all(package).map_err(directory(whole.path()))?;
        let read_only = Permissions::from_mode(0o444);
        whole.as_file().set_permissions(read_only).map_err(directory(whole.path()))?;
        let file = whole.reopen().map_err(directory(whole.path()))?;

        let path = self.file(key);
        let mut ledger = lock(&self.ledger);
        let tenant = self.path.join(&key.tenant);
        fs::create_dir_all(&tenant).map_err(directory(&tenant))?;
        whole.persist(&path).map_err(|error| directory(&path)(error.error))?;
        self.account(&mut ledger, key, bytes);
        Ok(Loaded { file: Arc::new(file), bytes })
    }

    /// Takes a file into account, and removes those that have to go.
    fn account(&self, ledger: &mut Ledger, key: &Key, bytes: u64) {
        for gone in ledger.insert(key, bytes) {
            tracing::info!(tenant = gone.tenant, digest = %gone.digest, "a package made room in the host's cache");
            self.discard(ledger, &gone);
        }
    }

    fn retain(&self, tenant: &str, digests: &BTreeSet<Digest>) {
        let mut ledger = lock(&self.ledger);
        for digest in ledger.of(tenant) {
            if !digests.contains(&digest) {
                self.discard(&mut ledger, &Key { tenant: tenant.to_owned(), digest });
            }
        }
    }

    fn discard(&self, ledger: &mut Ledger, key: &Key) {
        ledger.remove(key);
        let path = self.file(key);
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "a package stays on the host's disk");
        }
        // Only the last one's directory goes.
        let _ = fs::remove_dir(self.path.join(&key.tenant));
    }
}

/// What is in a directory; nothing if it is a file.
fn list(path: &Path) -> Result<Vec<fs::DirEntry>, CacheError> {
    match fs::read_dir(path) {
        Err(error) if error.kind() == ErrorKind::NotADirectory => Ok(Vec::new()),
        entries => entries.and_then(Iterator::collect).map_err(directory(path)),
    }
}

/// The file's length in bytes, if it has this digest.
fn verify(mut file: &File, digest: Digest) -> io::Result<Option<u64>> {
    let mut hash = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        match file.read(&mut chunk) {
            Ok(0) => break,
            Ok(read) => {
                hash.update(&chunk[..read]);
                bytes += read as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok((Digest::from_hash(hash) == digest).then_some(bytes))
}
