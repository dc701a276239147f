//! Where packages are kept, by digest: a region has them all, and each of its zones a copy, which is
//! what its hosts read. A zone whose copy is missing or damaged gets a new one from the region.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, ObjectStoreExt};
use url::Url;

use crate::blocking::blocking;
use crate::digest::Digest;

/// How long a store has to answer, and [`PER_MIB`] more for each MiB that is to come or go. A zone has
/// no longer before the region is asked instead.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a MiB may take: slower than that no function starts.
const PER_MIB: Duration = Duration::from_secs(1);

/// How many packages are copied at a time.
const AT_ONCE: usize = 4;

/// Why a package cannot be had, or kept.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store has none of this digest.
    #[error("{store} has no package {digest}: deploy the function anew")]
    Missing {
        /// The store.
        store: String,
        /// Which.
        digest: Digest,
    },
    /// What the store has under this digest is something else.
    #[error("the package {digest} in {store} is damaged: deploy the function anew")]
    Corrupt {
        /// The store.
        store: String,
        /// Which.
        digest: Digest,
    },
    /// The store cannot be reached.
    #[error("{store}: {source}; can it be reached, and may this process read and write it?")]
    Unreachable {
        /// The store.
        store: String,
        /// Why.
        source: Box<object_store::Error>,
    },
    /// The store does not answer.
    #[error("{store} does not answer in time: can it be reached?")]
    Silent {
        /// The store.
        store: String,
    },
    /// There is no such zone.
    #[error("there is no zone {zone:?} in this region: it has {zones}")]
    NoZone {
        /// Which was asked for.
        zone: String,
        /// Those that there are.
        zones: String,
    },
    /// Neither zone nor region can give it.
    #[error("{zone}; and {region}")]
    Neither {
        /// What the zone's store said.
        zone: Box<StoreError>,
        /// What the region's said.
        region: Box<StoreError>,
    },
}

/// Why there is no store.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory cannot be made.
    #[error("the directory {}: {source}; may this process write there?", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The URL is none, or none of a store.
    #[error(
        "{at:?} is no store of packages: {reason}; give a directory or a URL as s3://BUCKET/PREFIX"
    )]
    Url {
        /// What was given.
        at: String,
        /// Why.
        reason: String,
    },
}

/// One store of packages.
#[derive(Clone, Debug)]
pub struct Store {
    name: String,
    objects: Arc<dyn ObjectStore>,
}

impl Store {
    /// What errors call it, and where its packages are.
    pub fn new(name: &str, objects: Arc<dyn ObjectStore>) -> Self {
        Self { name: name.to_owned(), objects }
    }

    /// Opens what is at a place: a directory, which is made if it is not there, or a URL. That of S3
    /// takes its keys, its region and so on from the environment, as `AWS_ACCESS_KEY_ID`.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(name: &str, at: &str) -> Result<Self, OpenError> {
        if at.contains("://") {
            Self::at_url(name, at)
        } else {
            Self::in_directory(name, PathBuf::from(at))
        }
    }

    fn in_directory(name: &str, path: PathBuf) -> Result<Self, OpenError> {
        let made = std::fs::create_dir_all(&path)
            .and_then(|()| Ok(LocalFileSystem::new_with_prefix(&path)?.with_fsync(true)));
        match made {
            Ok(objects) => Ok(Self::new(name, Arc::new(objects))),
            Err(source) => Err(OpenError::Directory { path, source }),
        }
    }

    fn at_url(name: &str, at: &str) -> Result<Self, OpenError> {
        let failed = |reason: String| OpenError::Url { at: at.to_owned(), reason };
        let url = Url::parse(at).map_err(|error| failed(error.to_string()))?;
        let settings = std::env::vars_os().filter_map(|(name, value)| {
            let name = name.to_str()?.to_ascii_lowercase();
            name.starts_with("aws_").then_some(())?;
            Some((name, value.into_string().ok()?))
        });
        let (objects, prefix) = object_store::parse_url_opts(&url, settings)
            .map_err(|error| failed(error.to_string()))?;
        Ok(Self::new(name, Arc::new(PrefixStore::new(objects, prefix))))
    }

    /// Keeps a package.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] and [`StoreError::Silent`].
    pub async fn put(&self, package: Bytes) -> Result<Digest, StoreError> {
        let digest = digest_of(package.clone()).await;
        let (bytes, path) = (package.len() as u64, path(digest));
        let put = self.in_time(bytes, self.objects.put(&path, package.into())).await?;
        // What is not found there is the store itself.
        put.map_err(|source| self.unreachable(source))?;
        Ok(digest)
    }

    /// The package of this digest, which was verified.
    ///
    /// # Errors
    /// [`StoreError`], but for those of zones.
    pub async fn get(&self, digest: Digest) -> Result<Bytes, StoreError> {
        let error = |source| self.error(digest, source);
        let got = self.in_time(0, self.objects.get(&path(digest))).await?.map_err(error)?;
        let package = self.in_time(got.meta.size, got.bytes()).await?.map_err(error)?;
        if digest_of(package.clone()).await != digest {
            return Err(StoreError::Corrupt { store: self.name.clone(), digest });
        }
        Ok(package)
    }

    /// The digests of all packages that it has, whole or not.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] and [`StoreError::Silent`].
    pub async fn list(&self) -> Result<BTreeSet<Digest>, StoreError> {
        let mut objects = self.objects.list(None);
        let mut digests = BTreeSet::new();
        while let Some(object) = self.in_time(0, objects.next()).await? {
            let object = object.map_err(|source| self.unreachable(source))?;
            digests.extend(object.location.filename().and_then(|name| name.parse::<Digest>().ok()));
        }
        Ok(digests)
    }

    fn error(&self, digest: Digest, source: object_store::Error) -> StoreError {
        match source {
            object_store::Error::NotFound { .. } => {
                StoreError::Missing { store: self.name.clone(), digest }
            }
            source => self.unreachable(source),
        }
    }

    fn unreachable(&self, source: object_store::Error) -> StoreError {
        StoreError::Unreachable { store: self.name.clone(), source: Box::new(source) }
    }

    /// What it answers to something that moves so many bytes, if it does in time.
    async fn in_time<T>(
        &self,
        bytes: u64,
        answer: impl Future<Output = T>,
    ) -> Result<T, StoreError> {
        let patience = PATIENCE + PER_MIB * (bytes >> 20) as u32;
        let silent = |_| StoreError::Silent { store: self.name.clone() };
        tokio::time::timeout(patience, answer).await.map_err(silent)
    }
}

/// Not where others wait: that of a large package takes a tenth of a second.
async fn digest_of(package: Bytes) -> Digest {
    blocking(move || Digest::of(&package)).await
}

/// Directories of 256th parts of all packages, lest one gets too long.
fn path(digest: Digest) -> Path {
    let name = digest.to_string();
    Path::from_iter([&name[..2], &name])
}

/// A package that is in the region.
#[derive(Debug)]
pub struct Published {
    /// What it is called.
    pub digest: Digest,
    /// Zones that did not get their copy, and why: they will when they first need it, or
    /// [catch up](Repository::catch_up).
    pub left_out: Vec<(String, StoreError)>,
}

/// A region's packages, and their copies.
#[derive(Clone, Debug)]
pub struct Repository {
    region: Store,
    zones: BTreeMap<String, Store>,
}

impl Repository {
    /// The store of a region, and those of its zones by their names.
    pub fn new(region: Store, zones: BTreeMap<String, Store>) -> Self {
        Self { region, zones }
    }

    /// Keeps a package in the region, and copies it to every zone. A zone that is cut off stops
    /// nobody.
    ///
    /// # Errors
    /// [`StoreError`] of the region's store.
    pub async fn publish(&self, package: Bytes) -> Result<Published, StoreError> {
        let digest = self.region.put(package.clone()).await?;
        let copies = self.zones.iter().map(|(name, zone)| {
            let package = package.clone();
            async move { zone.put(package).await.err().map(|error| (name.clone(), error)) }
        });
        let left_out = join_all(copies).await.into_iter().flatten().collect();
        Ok(Published { digest, left_out })
    }

    /// The package of this digest, from the zone's store; from the region's if the zone has none that
    /// is whole, which is then copied to it.
    ///
    /// # Errors
    /// [`StoreError`] of the zone and of the region.
    pub async fn get(&self, zone: &str, digest: Digest) -> Result<Bytes, StoreError> {
        let zone = self.zone(zone)?;
        let error = match zone.get(digest).await {
            Ok(package) => return Ok(package),
            Err(error) => error,
        };
        tracing::warn!(%digest, %error, "a zone's store has no whole package: the region is asked");
        let package = match self.region.get(digest).await {
            Ok(package) => package,
            Err(region) => {
                return Err(StoreError::Neither {
                    zone: Box::new(error),
                    region: Box::new(region),
                });
            }
        };
        if matches!(error, StoreError::Missing { .. } | StoreError::Corrupt { .. })
            && let Err(error) = zone.put(package.clone()).await
        {
            tracing::warn!(%digest, %error, "a zone's store does not take its copy of a package");
        }
        Ok(package)
    }

    /// Copies what the region has, and a zone has not, to the zone: that was cut off, or is new.
    /// Answers how many packages that were.
    ///
    /// # Errors
    /// The first [`StoreError`]; the copies until then stay.
    pub async fn catch_up(&self, zone: &str) -> Result<usize, StoreError> {
        let zone = self.zone(zone)?;
        let (here, there) = (self.region.list().await?, zone.list().await?);
        let copies = here.difference(&there).map(|&digest| async move {
            let package = self.region.get(digest).await?;
            zone.put(package).await
        });
        let done: Vec<_> = stream::iter(copies).buffer_unordered(AT_ONCE).try_collect().await?;
        Ok(done.len())
    }

    fn zone(&self, name: &str) -> Result<&Store, StoreError> {
        self.zones.get(name).ok_or_else(|| StoreError::NoZone {
            zone: name.to_owned(),
            zones: self.zones.keys().cloned().collect::<Vec<_>>().join(", "),
        })
    }
}
