//! Stores that fail, and that count.

use std::collections::BTreeMap;
use std::fmt;
use std::future::pending;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{BoxStream, StreamExt, TryStreamExt, once};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use warren_function::digest::Digest;
use warren_function::repository::{Repository, Store};

/// How a store answers.
#[derive(Clone, Copy, Debug)]
pub enum Answers {
    /// As it should.
    Well,
    /// With an error: it is cut off, and the network says so.
    WithErrors,
    /// Never.
    Never,
}

/// A store in memory, whose line can be cut, and that counts what is got from it.
#[derive(Debug)]
pub struct Line {
    pub objects: InMemory,
    answers: Mutex<Answers>,
    gets: AtomicUsize,
}

impl Line {
    pub fn new() -> Arc<Self> {
        let answers = Mutex::new(Answers::Well);
        Arc::new(Self { objects: InMemory::new(), answers, gets: AtomicUsize::new(0) })
    }

    pub fn set(&self, answers: Answers) {
        *self.answers.lock().unwrap() = answers;
    }

    /// How many packages were asked for.
    pub fn gets(&self) -> usize {
        self.gets.load(Ordering::SeqCst)
    }

    /// Damages what is kept under a digest, or puts this there.
    pub async fn damage(&self, digest: Digest, bytes: &'static [u8]) {
        self.objects.put(&location(digest), Bytes::from_static(bytes).into()).await.unwrap();
    }

    pub async fn remove(&self, digest: Digest) {
        self.objects.delete(&location(digest)).await.unwrap();
    }

    pub async fn has(&self, digest: Digest) -> bool {
        let Ok(got) = self.objects.get(&location(digest)).await else { return false };
        Digest::of(&got.bytes().await.unwrap()) == digest
    }

    async fn line(&self) -> Result<()> {
        let answers = *self.answers.lock().unwrap();
        line(answers).await
    }
}

async fn line(answers: Answers) -> Result<()> {
    match answers {
        Answers::Well => Ok(()),
        Answers::WithErrors => Err(Error::Generic { store: "line", source: "cut".into() }),
        Answers::Never => pending().await,
    }
}

/// Where a package is.
fn location(digest: Digest) -> Path {
    let name = digest.to_string();
    Path::from_iter([&name[..2], &name])
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a line")
    }
}

#[async_trait]
impl ObjectStore for Line {
    async fn put_opts(&self, at: &Path, payload: PutPayload, o: PutOptions) -> Result<PutResult> {
        self.line().await?;
        self.objects.put_opts(at, payload, o).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.line().await?;
        self.objects.put_multipart_opts(at, options).await
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        self.gets.fetch_add(1, Ordering::SeqCst);
        // Others get to ask meanwhile.
        tokio::task::yield_now().await;
        self.line().await?;
        self.objects.get_opts(at, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.objects.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let answers = *self.answers.lock().unwrap();
        let list = self.objects.list(prefix);
        once(async move { line(answers).await.map(|()| list) }).try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.line().await?;
        self.objects.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.line().await?;
        self.objects.copy_opts(from, to, options).await
    }
}

/// A region with two zones.
pub struct Region {
    pub whole: Arc<Line>,
    pub a: Arc<Line>,
    pub b: Arc<Line>,
    pub repository: Repository,
}

impl Region {
    pub fn new() -> Self {
        let [whole, a, b] = [Line::new(), Line::new(), Line::new()];
        let store = |name: &str, line: &Arc<Line>| {
            Store::new(name, Arc::clone(line) as Arc<dyn ObjectStore>)
        };
        let zones = [("a", &a), ("b", &b)];
        let zones =
            zones.map(|(name, line)| (name.to_owned(), store(&format!("zone {name}"), line)));
        let repository = Repository::new(store("the region", &whole), BTreeMap::from(zones));
        Self { whole, a, b, repository }
    }
}
