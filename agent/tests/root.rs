//! A function's root is its image with the clone's own files over it.

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use common::{apart, identity};
use nix::mount::{MsFlags, mount};
use warren_agent::root::overlay;

/// Gives this an image, and has it look at the root over it.
fn with_root(build: fn(image: &Path), look: fn(root: &Path)) {
    apart(move || {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        let [image, layer, root] = ["image", "layer", "root"].map(|name| folder.join(name));
        fs::create_dir(&image).unwrap();
        build(&image);
        overlay(&image, &layer, &root, &identity()).unwrap();
        look(&root);
        let detach = nix::mount::MntFlags::MNT_DETACH;
        nix::mount::umount2(&root, detach).unwrap();
        nix::mount::umount2(folder, detach).unwrap();
    });
}

fn look_at_etc(root: &Path) {
    let read = |name: &str| fs::read_to_string(root.join("etc").join(name)).unwrap();
    assert_eq!(read("hostname"), "clone-7\n");
    assert_eq!(read("hosts"), "127.0.0.1 localhost\n10.1.0.7 clone-7\n");
    assert_eq!(read("resolv.conf"), "nameserver 169.254.169.253\n");
    assert_eq!(read("machine-id"), "0123456789ab4def8123456789abcdef\n");
    for name in ["proc", "sys", "dev", "run", "tmp"] {
        assert!(root.join(name).is_dir(), "{name}");
    }
}

#[test]
fn the_images_files_stay() {
    let build = |image: &Path| {
        fs::create_dir(image.join("etc")).unwrap();
        fs::write(image.join("etc/passwd"), "root").unwrap();
        fs::write(image.join("etc/machine-id"), "the image's").unwrap();
        fs::write(image.join("function"), "program").unwrap();
    };
    with_root(build, |root| {
        look_at_etc(root);
        assert_eq!(fs::read_to_string(root.join("etc/passwd")).unwrap(), "root");
        assert_eq!(fs::read_to_string(root.join("function")).unwrap(), "program");
        // What is written goes into the layer, and not into the image.
        fs::write(root.join("function"), "other").unwrap();
        let image = root.with_file_name("image");
        assert_eq!(fs::read_to_string(image.join("function")).unwrap(), "program");
        assert_eq!(fs::read_to_string(image.join("etc/machine-id")).unwrap(), "the image's");
    });
}

#[test]
fn links_of_the_image_are_not_followed() {
    let build = |image: &Path| {
        let outside = image.with_file_name("outside");
        fs::create_dir(&outside).unwrap();
        fs::create_dir(image.join("etc")).unwrap();
        symlink(outside.join("hosts"), image.join("etc/hosts")).unwrap();
        symlink(&outside, image.join("proc")).unwrap();
        symlink("nowhere", image.join("tmp")).unwrap();
    };
    with_root(build, |root| {
        look_at_etc(root);
        assert_eq!(fs::read_dir(root.with_file_name("outside")).unwrap().count(), 0);
    });
    let build = |image: &Path| {
        let outside = image.with_file_name("outside");
        fs::create_dir(&outside).unwrap();
        symlink(&outside, image.join("etc")).unwrap();
    };
    with_root(build, |root| {
        look_at_etc(root);
        assert_eq!(fs::read_dir(root.with_file_name("outside")).unwrap().count(), 0);
    });
}

#[test]
fn an_empty_image_is_one() {
    with_root(|_| {}, look_at_etc);
}
