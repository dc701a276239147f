//! Encryption at rest, as an option: `XChaCha20-Poly1305` (draft-irtf-cfrg-xchacha-03).
//!
//! A file's body is one message, whose associated data are the bytes before it, the nonce among
//! them; the tag is verified before anything is decrypted. A nonce is drawn for each file: of 192
//! bits, none is drawn twice.

use std::path::Path;

use chacha20poly1305::aead::{AeadInOut, Generate, KeyInit};
use chacha20poly1305::{Tag, XChaCha20Poly1305, XNonce};
use zeroize::Zeroizing;

use super::SnapshotError;

/// Length of a nonce, in bytes.
pub const NONCE: usize = 24;

/// Length of a tag, in bytes.
pub const TAG: usize = 16;

/// Length of a key, in bytes.
const KEY: usize = 32;

/// The key of encrypted files. It is wiped from memory when it is dropped.
pub struct Key(XChaCha20Poly1305);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key")
    }
}

impl Key {
    /// Reads a key file: 32 bytes and nothing else.
    ///
    /// # Errors
    /// [`SnapshotError::Io`], [`SnapshotError::Key`].
    pub fn read(path: &Path) -> Result<Self, SnapshotError> {
        let bytes = std::fs::read(path)
            .map_err(|source| SnapshotError::Io { path: path.to_owned(), source })?;
        let bytes = Zeroizing::new(bytes);
        match <&[u8; KEY]>::try_from(bytes.as_slice()) {
            Ok(key) => Ok(Self(XChaCha20Poly1305::new(key.into()))),
            Err(_) => Err(SnapshotError::Key { path: path.to_owned(), found: bytes.len() }),
        }
    }

    /// [`Key::read`], if there is a file.
    ///
    /// # Errors
    /// The same.
    pub fn read_optional(path: Option<&Path>) -> Result<Option<Self>, SnapshotError> {
        path.map(Self::read).transpose()
    }

    /// Encrypts a message in place; returns its tag.
    ///
    /// # Errors
    /// The message is longer than the cipher allows, 256 GiB.
    pub(super) fn encrypt(
        &self,
        nonce: [u8; NONCE],
        associated: &[u8],
        message: &mut [u8],
    ) -> std::io::Result<[u8; TAG]> {
        let tag = self.0.encrypt_inout_detached(&nonce.into(), associated, message.into());
        tag.map(Into::into).map_err(std::io::Error::other)
    }

    /// Verifies a message and then decrypts it in place; `None` if it is not what was encrypted with
    /// this key.
    pub(super) fn decrypt(
        &self,
        nonce: [u8; NONCE],
        associated: &[u8],
        message: &mut [u8],
        tag: [u8; TAG],
    ) -> Option<()> {
        let tag = Tag::from(tag);
        self.0.decrypt_inout_detached(&nonce.into(), associated, message.into(), &tag).ok()
    }
}

/// A nonce that no other file has.
///
/// # Errors
/// The host has no randomness to give.
pub fn nonce() -> std::io::Result<[u8; NONCE]> {
    XNonce::try_generate().map(Into::into).map_err(std::io::Error::other)
}
