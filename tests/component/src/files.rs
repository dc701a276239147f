//! The file system.

use wasip2::filesystem::preopens::get_directories;
use wasip2::filesystem::types::{
    Descriptor, DescriptorFlags, DescriptorType, ErrorCode, OpenFlags, PathFlags,
};

const WRITABLE: DescriptorFlags = DescriptorFlags::READ.union(DescriptorFlags::WRITE);

pub fn perform(what: &str, with: &str) -> Result<String, String> {
    let mut directories = get_directories();
    let (root, name) = directories.pop().ok_or("no directory")?;
    assert_eq!(name, "/");
    let said = |error: ErrorCode| error.name().to_owned();
    let (first, second) = with.split_once('=').unwrap_or((with, ""));
    match what {
        "/read" => read(&root, first),
        "/write" => write(&root, first, second),
        "/list" => list(&root, first),
        "/rename" => root.rename_at(first, &root, second).map(|()| "renamed".into()),
        "/unlink" => root.unlink_file_at(first).map(|()| "unlinked".into()),
        "/mkdir" => root.create_directory_at(first).map(|()| "made".into()),
        "/rmdir" => root.remove_directory_at(first).map(|()| "removed".into()),
        "/fill" => fill(&root, first),
        "/stat" => {
            let is_directory = |it| it == DescriptorType::Directory;
            let stat = root.stat_at(PathFlags::empty(), first);
            stat.map(|it| format!("{} {}", is_directory(it.type_), it.size))
        }
        _ => return Err(format!("{what} is nothing to do with files")),
    }
    .map_err(said)
}

fn open(root: &Descriptor, path: &str) -> Result<Descriptor, ErrorCode> {
    root.open_at(PathFlags::empty(), path, OpenFlags::empty(), DescriptorFlags::READ)
}

fn read(root: &Descriptor, path: &str) -> Result<String, ErrorCode> {
    let file = open(root, path)?;
    let mut contents = Vec::new();
    loop {
        let (piece, is_end) = file.read(1000, contents.len() as u64)?;
        contents.extend(piece);
        if is_end {
            return Ok(String::from_utf8_lossy(&contents).into_owned());
        }
    }
}

fn write(root: &Descriptor, path: &str, text: &str) -> Result<String, ErrorCode> {
    let flags = OpenFlags::CREATE | OpenFlags::TRUNCATE;
    let file = root.open_at(PathFlags::empty(), path, flags, WRITABLE)?;
    for (stream, bytes) in
        [(file.write_via_stream(0)?, text.as_bytes()), (file.append_via_stream()?, b"!")]
    {
        if stream.blocking_write_and_flush(bytes).is_err() {
            return Ok("the stream broke".into());
        }
    }
    Ok(format!("{} bytes", file.stat()?.size))
}

fn list(root: &Descriptor, path: &str) -> Result<String, ErrorCode> {
    let entries = open(root, path)?.read_directory()?;
    let mut names = Vec::new();
    while let Some(entry) = entries.read_directory_entry()? {
        let mark = if entry.type_ == DescriptorType::Directory { "/" } else { "" };
        names.push(entry.name + mark);
    }
    names.sort();
    Ok(names.join(" "))
}

/// Writes until there is no room, and says how many KiB that were.
fn fill(root: &Descriptor, path: &str) -> Result<String, ErrorCode> {
    let file = root.open_at(PathFlags::empty(), path, OpenFlags::CREATE, WRITABLE)?;
    let piece = vec![b'x'; 64 * 1024];
    let mut written = 0;
    loop {
        match file.write(&piece, written) {
            Ok(length) => written += length,
            Err(error) => return Ok(format!("{} {}", written / 1024, error.name())),
        }
    }
}
