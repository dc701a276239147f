//! A region with two zones, of which one is cut off or has damaged packages.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use bytes::Bytes;
use warren_function::digest::Digest;
use warren_function::repository::{OpenError, Repository, Store, StoreError};

use crate::line::{Answers, Region};

const PACKAGE: Bytes = Bytes::from_static(b"a package");

#[tokio::test]
async fn what_is_published_is_in_the_region_and_in_every_zone() {
    let Region { whole: region, a, b, repository } = Region::new();
    let published = repository.publish(PACKAGE).await.unwrap();
    assert_eq!(published.digest, Digest::of(&PACKAGE));
    assert!(published.left_out.is_empty());
    for line in [&region, &a, &b] {
        assert!(line.has(published.digest).await);
    }
    for zone in ["a", "b"] {
        assert_eq!(repository.get(zone, published.digest).await.unwrap(), PACKAGE);
    }
    // Each zone gave its own.
    assert_eq!((region.gets(), a.gets(), b.gets()), (0, 1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_zone_that_is_cut_off_stops_nobody_and_catches_up() {
    for answers in [Answers::WithErrors, Answers::Never] {
        let Region { whole: region, a, b, repository } = Region::new();
        b.set(answers);
        let published = repository.publish(PACKAGE).await.unwrap();
        let [(zone, error)] = &published.left_out[..] else { panic!("{published:?}") };
        assert_eq!(zone, "b");
        assert!(error.to_string().starts_with("zone b"), "{error}");

        // The other zone does not even ask the region; this one gets along with it.
        assert_eq!(repository.get("a", published.digest).await.unwrap(), PACKAGE);
        assert_eq!((region.gets(), a.gets()), (0, 1));
        assert_eq!(repository.get("b", published.digest).await.unwrap(), PACKAGE);
        assert_eq!(region.gets(), 1);

        b.set(Answers::Well);
        assert!(!b.has(published.digest).await);
        assert_eq!(repository.catch_up("b").await.unwrap(), 1);
        assert!(b.has(published.digest).await);
        assert_eq!(repository.catch_up("b").await.unwrap(), 0);
        assert_eq!(repository.catch_up("a").await.unwrap(), 0);
    }
}

#[tokio::test]
async fn a_zone_works_while_the_region_is_cut_off() {
    let Region { whole: region, repository, .. } = Region::new();
    let digest = repository.publish(PACKAGE).await.unwrap().digest;
    region.set(Answers::WithErrors);
    assert_eq!(repository.get("a", digest).await.unwrap(), PACKAGE);
    let error = repository.publish(PACKAGE).await.unwrap_err();
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_never_answers_is_told_from_one_that_fails() {
    let Region { whole: region, a, repository, .. } = Region::new();
    region.set(Answers::Never);
    a.set(Answers::Never);
    let errors = [
        repository.publish(PACKAGE).await.unwrap_err(),
        repository.catch_up("b").await.unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(&error, StoreError::Silent { store } if store == "the region"), "{error}");
    }
    let error = repository.get("a", Digest::of(&PACKAGE)).await.unwrap_err();
    assert!(matches!(error, StoreError::Neither { .. }), "{error}");
}

#[tokio::test]
async fn a_zone_heals_from_the_region() {
    let Region { whole: region, a, b, repository } = Region::new();
    let digest = repository.publish(PACKAGE).await.unwrap().digest;
    a.remove(digest).await;
    b.damage(digest, b"a packagf").await;
    for (zone, line) in [("a", &a), ("b", &b)] {
        assert!(!line.has(digest).await);
        assert_eq!(repository.get(zone, digest).await.unwrap(), PACKAGE);
        assert!(line.has(digest).await);
    }
    assert_eq!(region.gets(), 2);
}

#[tokio::test]
async fn what_nobody_has_whole_is_not_given() {
    let Region { whole: region, a, repository, .. } = Region::new();
    let digest = repository.publish(PACKAGE).await.unwrap().digest;
    a.damage(digest, b"").await;
    region.damage(digest, b"something else").await;
    let error = repository.get("a", digest).await.unwrap_err();
    let StoreError::Neither { zone, region: of_region } = &error else { panic!("{error}") };
    assert!(matches!(**zone, StoreError::Corrupt { .. }), "{zone}");
    assert!(matches!(**of_region, StoreError::Corrupt { .. }), "{of_region}");
    // And the damage does not spread.
    assert!(!a.has(digest).await);

    let unknown = Digest::of(b"unknown");
    let error = repository.get("a", unknown).await.unwrap_err();
    assert!(error.to_string().contains(&format!("zone a has no package {unknown}")), "{error}");
    assert!(error.to_string().contains("the region has no package"), "{error}");
    let error = repository.get("c", digest).await.unwrap_err();
    assert_eq!(error.to_string(), "there is no zone \"c\" in this region: it has a, b");
}

#[tokio::test]
async fn stores_are_directories_and_what_a_crash_left_there_does_not_count() {
    let directory = tempfile::tempdir().unwrap();
    let open = |name: &str| {
        let path = directory.path().join(name);
        Store::open(name, path.to_str().unwrap()).unwrap()
    };
    let repository =
        Repository::new(open("region"), BTreeMap::from([("z".to_owned(), open("zone"))]));
    let digest = repository.publish(PACKAGE).await.unwrap().digest;
    let name = digest.to_string();
    let file = directory.path().join("zone").join(&name[..2]).join(&name);
    assert_eq!(fs::read(&file).unwrap(), PACKAGE);

    // A write that a crash cut: before the rename, and, of a disk that lies, after it.
    fs::rename(&file, file.with_file_name(format!("{name}#1"))).unwrap();
    assert!(open("zone").list().await.unwrap().is_empty());
    fs::write(&file, &PACKAGE[..4]).unwrap();
    assert_eq!(repository.get("z", digest).await.unwrap(), PACKAGE);
    assert_eq!(fs::read(&file).unwrap(), PACKAGE);
    assert_eq!(open("zone").list().await.unwrap(), BTreeSet::from([digest]));
}

#[tokio::test]
async fn stores_are_urls_too() {
    let directory = tempfile::tempdir().unwrap();
    let at = format!("file://{}", directory.path().display());
    let digest = Store::open("url", &at).unwrap().put(PACKAGE).await.unwrap();
    let same = Store::open("path", directory.path().to_str().unwrap()).unwrap();
    assert_eq!(same.get(digest).await.unwrap(), PACKAGE);

    for at in ["ftp://host/x", "://", "s3 ://x"] {
        let error = Store::open("x", at).unwrap_err();
        assert!(matches!(error, OpenError::Url { .. }), "{error}");
        assert!(error.to_string().contains("s3://BUCKET/PREFIX"), "{error}");
    }
    let gone = tempfile::tempdir().unwrap();
    let store = Store::open("gone", gone.path().to_str().unwrap()).unwrap();
    let path = gone.path().to_owned();
    drop(gone);
    fs::write(&path, b"").unwrap();
    let error = store.put(PACKAGE).await.unwrap_err();
    fs::remove_file(&path).unwrap();
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
    let file = directory.path().join("file");
    fs::write(&file, b"").unwrap();
    let error = Store::open("x", file.to_str().unwrap()).unwrap_err();
    assert!(matches!(error, OpenError::Directory { .. }), "{error}");
}
