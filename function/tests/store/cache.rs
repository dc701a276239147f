//! A host's cache before a zone that counts, fails, and is slow.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::future::join_all;
use tempfile::TempDir;
use warren_function::cache::{Cache, CacheError, Loaded, Source};
use warren_function::digest::Digest;

use crate::line::{Answers, Region};

const SIZE: usize = 1000;

/// A host in zone a.
struct Host {
    directory: TempDir,
    region: Region,
}

impl Host {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap(), region: Region::new() }
    }

    fn cache(&self, packages: usize) -> Cache {
        let source = Source { repository: self.region.repository.clone(), zone: "a".to_owned() };
        Cache::open(self.directory.path(), (packages * SIZE) as u64, source).unwrap()
    }

    async fn publish(&self, number: u8) -> Digest {
        self.region.repository.publish(package(number)).await.unwrap().digest
    }

    fn file(&self, tenant: &str, digest: Digest) -> PathBuf {
        self.directory.path().join(tenant).join(digest.to_string())
    }
}

fn package(number: u8) -> Bytes {
    vec![number; SIZE].into()
}

fn contents(loaded: &Loaded) -> Vec<u8> {
    let mut bytes = vec![0; loaded.bytes as usize];
    loaded.file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// What lies around in the cache's directory, but for its packages.
fn incoming(path: &Path) -> usize {
    fs::read_dir(path.join(".incoming")).unwrap().count()
}

#[tokio::test]
async fn a_package_is_fetched_once_and_then_is_there_without_the_zone() {
    let host = Host::new();
    let digest = host.publish(1).await;
    let cache = host.cache(4);
    let loaded = cache.get("t", digest).await.unwrap();
    assert_eq!(contents(&loaded), package(1));
    for line in [&host.region.a, &host.region.whole] {
        line.set(Answers::WithErrors);
    }
    let again = host.cache(4).get("t", digest).await.unwrap();
    assert_eq!(contents(&again), package(1));
    assert_eq!(host.region.a.gets(), 1);
    let mode = fs::metadata(host.file("t", digest)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o444);
}

#[tokio::test]
async fn first_calls_at_once_fetch_once_and_share_errors() {
    let host = Host::new();
    let digest = host.publish(1).await;
    let cache = host.cache(4);
    let calls = || join_all((0..50).map(|_| cache.get("t", digest)));
    host.region.a.set(Answers::WithErrors);
    host.region.whole.set(Answers::WithErrors);
    assert!(calls().await.iter().all(Result::is_err));
    assert_eq!((host.region.a.gets(), host.region.whole.gets()), (1, 1));

    host.region.a.set(Answers::Well);
    for loaded in calls().await {
        assert_eq!(contents(&loaded.unwrap()), package(1));
    }
    assert_eq!(host.region.a.gets(), 2);
    // Another tenant has its own copy.
    cache.get("u", digest).await.unwrap();
    assert_eq!(host.region.a.gets(), 3);
}

#[tokio::test(start_paused = true)]
async fn who_gives_up_leaves_the_others_waiting_for_the_same() {
    let host = Host::new();
    let digest = host.publish(1).await;
    let cache = host.cache(4);
    host.region.a.set(Answers::Never);
    let first = tokio::spawn({
        let cache = cache.clone();
        async move { cache.get("t", digest).await }
    });
    let mut second = Box::pin(cache.get("t", digest));
    while host.region.a.gets() == 0 {
        assert!(futures_util::poll!(&mut second).is_pending());
        tokio::task::yield_now().await;
    }
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    // The zone is silent, the region is asked after a while.
    assert_eq!(contents(&second.await.unwrap()), package(1));
    assert_eq!((host.region.a.gets(), host.region.whole.gets()), (1, 1));
}

#[tokio::test]
async fn what_is_damaged_is_fetched_anew() {
    let host = Host::new();
    let digest = host.publish(1).await;
    let cache = host.cache(4);
    let file = host.file("t", digest);
    cache.get("t", digest).await.unwrap();
    let damages: [&dyn Fn(); 3] = [
        &|| fs::write(&file, b"").unwrap(),
        &|| fs::write(&file, [&package(1)[..], b"more"].concat()).unwrap(),
        &|| fs::remove_file(&file).unwrap(),
    ];
    for (number, damage) in damages.iter().enumerate() {
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        damage();
        let loaded = cache.get("t", digest).await.unwrap();
        assert_eq!(contents(&loaded), package(1));
        assert_eq!(fs::read(&file).unwrap(), package(1));
        assert_eq!(host.region.a.gets(), 2 + number);
        assert_eq!(cache.bytes(), SIZE as u64);
    }
}

#[tokio::test]
async fn what_a_crash_leaves_is_gone_or_is_verified() {
    let host = Host::new();
    let digest = host.publish(1).await;
    drop(host.cache(4));
    let partial = host.directory.path().join(".incoming").join("partial");
    fs::write(&partial, b"half of a pack").unwrap();
    fs::create_dir(host.directory.path().join("t")).unwrap();
    // A rename that was on the disk before the file's contents.
    fs::write(host.file("t", digest), vec![0; 10]).unwrap();
    fs::write(host.directory.path().join("t/no-digest"), b"").unwrap();
    fs::write(host.directory.path().join("no-tenant"), b"").unwrap();

    let cache = host.cache(4);
    assert_eq!(incoming(host.directory.path()), 0);
    assert_eq!(cache.bytes(), 10);
    assert_eq!(contents(&cache.get("t", digest).await.unwrap()), package(1));
    assert_eq!((cache.bytes(), incoming(host.directory.path())), (SIZE as u64, 0));
}

#[tokio::test]
async fn the_tenant_that_was_used_longest_ago_goes_and_what_is_open_stays_readable() {
    let host = Host::new();
    let digests = join_all((1..=5).map(|number| host.publish(number))).await;
    let cache = host.cache(4);
    let first = cache.get("old", digests[0]).await.unwrap();
    cache.get("old", digests[1]).await.unwrap();
    cache.get("new", digests[2]).await.unwrap();
    cache.get("new", digests[3]).await.unwrap();
    cache.get("newest", digests[4]).await.unwrap();
    assert!(!host.directory.path().join("old").exists());
    assert!(host.file("new", digests[2]).exists() && host.file("newest", digests[4]).exists());
    assert_eq!(cache.bytes(), 3 * SIZE as u64);
    assert_eq!(contents(&first), package(1));

    // After a restart with less room the same order holds.
    cache.get("new", digests[2]).await.unwrap();
    let cache = host.cache(2);
    assert!(host.file("new", digests[2]).exists());
    assert!(cache.bytes() <= 2 * SIZE as u64);
}

#[tokio::test]
async fn a_host_keeps_what_it_is_told_of_a_tenant() {
    let host = Host::new();
    let digests = join_all((1..=3).map(|number| host.publish(number))).await;
    let cache = host.cache(4);
    let unknown = Digest::of(b"unknown");
    let failed = cache.keep("t", &BTreeSet::from([digests[0], digests[1], unknown])).await.unwrap();
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0].0, unknown);
    cache.keep("t", &BTreeSet::from([digests[1], digests[2]])).await.unwrap();
    assert!(!host.file("t", digests[0]).exists());
    assert!(host.file("t", digests[1]).exists() && host.file("t", digests[2]).exists());
    assert_eq!(host.region.a.gets(), 4);
    cache.keep("t", &BTreeSet::new()).await.unwrap();
    assert!(!host.directory.path().join("t").exists());
    assert_eq!(cache.bytes(), 0);
}

#[tokio::test]
async fn what_cannot_be_cached_says_why() {
    let host = Host::new();
    let digest = host.publish(1).await;
    let cache = host.cache(1);
    for tenant in ["", "..", ".incoming", "a/b", "-a", "a.", "a b", &"a".repeat(129)] {
        let error = cache.get(tenant, digest).await.unwrap_err();
        assert!(matches!(&*error, CacheError::Tenant(name) if name == tenant), "{error}");
        assert!(cache.keep(tenant, &BTreeSet::new()).await.is_err());
    }
    let large = Bytes::from(vec![0; SIZE + 1]);
    let digest = host.region.repository.publish(large).await.unwrap().digest;
    let error = cache.get("t", digest).await.unwrap_err();
    assert!(matches!(*error, CacheError::TooLarge { bytes: 1001, limit: 1000, .. }), "{error}");
    assert_eq!((cache.bytes(), incoming(host.directory.path())), (0, 0));

    // Nor does it stay in a cache that was made smaller.
    host.cache(2).get("t", digest).await.unwrap();
    assert_eq!(host.cache(1).bytes(), 0);
    assert!(!host.file("t", digest).exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_calls_in_a_small_cache_get_the_right_packages_and_the_accounts_are_right() {
    let host = Host::new();
    let digests = join_all((0..4).map(|number| host.publish(number))).await;
    let cache = host.cache(5);
    let calls = (0..400_usize).map(|call| {
        let (cache, number) = (cache.clone(), call * 7 % 4);
        let digest = digests[number];
        tokio::spawn(async move {
            let loaded = cache.get(["t", "u", "v"][call % 3], digest).await.unwrap();
            assert_eq!(contents(&loaded), package(number as u8));
        })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap();
    }
    assert!(cache.bytes() <= 5 * SIZE as u64);
    // Opened anew it counts the files.
    let accounted = cache.bytes();
    assert_eq!(host.cache(100).bytes(), accounted);
}
