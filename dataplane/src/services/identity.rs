//! The host's key: it signs instances' identity tokens, and seals the metadata service's session
//! tokens.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::{Signer, SigningKey};
use serde::Serialize;
use serde_json::{Value, json};

use super::Instance;
use crate::boot::BootId;
use crate::datapath::Attachment;

/// How long an identity token is valid.
pub const IDENTITY_LIFETIME: Duration = Duration::from_mins(5);
/// The longest that a session token is valid: 6 hours.
pub const SESSION_MAX: Duration = Duration::from_hours(6);

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A file cannot be read or written.
    #[error("cannot {action} {path}: {source}; check run_dir")]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The file is not what was written.
    #[error("{0} does not hold a key of 32 bytes: remove it, and a new one is made")]
    Damaged(PathBuf),
}

/// The key.
pub struct Identity {
    issuer: String,
    signing: SigningKey,
    /// Name of the signing key.
    key_id: String,
    session: [u8; 32],
}

/// What an identity token says (RFC 7519), beside what it says of the instance.
#[derive(Serialize)]
struct Claims<'a> {
    iss: &'a str,
    sub: &'a str,
    aud: &'a str,
    iat: u64,
    exp: u64,
    #[serde(flatten)]
    instance: &'a Instance,
}

impl Identity {
    /// The key in the file `identity.key` of a directory, made if there is none, for nobody else
    /// to read; its public half is in `jwks.json` for everybody. `issuer` is who signs. Attachments
    /// are counted anew in each boot, so session tokens are of one boot only.
    pub fn open(directory: &Path, issuer: &str, boot: &BootId) -> Result<Self, KeyError> {
        let path = directory.join("identity.key");
        let seed = match fs::read(&path) {
            Ok(bytes) => bytes.try_into().map_err(|_| KeyError::Damaged(path))?,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let seed: [u8; 32] = rand::random();
                replace(&path, &seed, 0o600)?;
                seed
            }
            Err(source) => return Err(KeyError::File { action: "read", path, source }),
        };
        let identity = Self::new(seed, issuer, boot);
        let set = identity.key_set().to_string();
        replace(&directory.join("jwks.json"), set.as_bytes(), 0o644)?;
        Ok(identity)
    }

    fn new(seed: [u8; 32], issuer: &str, boot: &BootId) -> Self {
        let signing = SigningKey::from_bytes(&seed);
        let digest = blake3::hash(signing.verifying_key().as_bytes());
        let key_id = URL_SAFE_NO_PAD.encode(&digest.as_bytes()[..12]);
        let mut session = blake3::Hasher::new_derive_key("warren metadata session tokens");
        let session = *session.update(&seed).update(boot.as_bytes()).finalize().as_bytes();
        Self { issuer: issuer.to_owned(), signing, key_id, session }
    }

    /// The public key, as a set of one (RFC 7517, RFC 8037).
    pub fn key_set(&self) -> Value {
        let public = URL_SAFE_NO_PAD.encode(self.signing.verifying_key().as_bytes());
        json!({ "keys": [{
            "kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig",
            "kid": self.key_id, "x": public,
        }]})
    }

    /// A token that says who an instance is, for one audience (RFC 7515, RFC 8037).
    pub fn sign(&self, instance: &Instance, audience: &str) -> String {
        let now = unix_time();
        let header = json!({ "alg": "EdDSA", "typ": "JWT", "kid": self.key_id });
        let claims = Claims {
            iss: &self.issuer,
            sub: &instance.instance_id,
            aud: audience,
            iat: now,
            exp: now + IDENTITY_LIFETIME.as_secs(),
            instance,
        };
        // Structs of texts and numbers become JSON.
        let claims = serde_json::to_vec(&claims).unwrap_or_default();
        let header = URL_SAFE_NO_PAD.encode(header.to_string());
        let signed = format!("{header}.{}", URL_SAFE_NO_PAD.encode(claims));
        let signature = self.signing.sign(signed.as_bytes());
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.to_bytes()))
    }

    /// A session token for who is attached to a slot now, valid for so long. Nothing is kept of
    /// it: it seals its own end and whose it is.
    pub fn open_session(&self, slot: u32, attachment: Attachment, lifetime: Duration) -> String {
        let expires = unix_time() + lifetime.min(SESSION_MAX).as_secs();
        let mut token = expires.to_be_bytes().to_vec();
        token.extend_from_slice(self.seal(slot, attachment, expires).as_bytes());
        URL_SAFE_NO_PAD.encode(token)
    }

    /// Whether a session token is this attachment's, and still valid.
    pub fn is_session(&self, token: &str, slot: u32, attachment: Attachment) -> bool {
        let Ok(bytes) = URL_SAFE_NO_PAD.decode(token) else { return false };
        let Some((expires, seal)) = bytes.split_first_chunk() else { return false };
        let Ok(seal) = <[u8; 32]>::try_from(seal) else { return false };
        let expires = u64::from_be_bytes(*expires);
        // Comparing hashes takes the same time wherever they differ.
        self.seal(slot, attachment, expires) == blake3::Hash::from(seal) && unix_time() < expires
    }

    fn seal(&self, slot: u32, attachment: Attachment, expires: u64) -> blake3::Hash {
        let Attachment { vni, generation } = attachment;
        let mut hasher = blake3::Hasher::new_keyed(&self.session);
        for part in [slot, vni, generation] {
            hasher.update(&part.to_be_bytes());
        }
        hasher.update(&expires.to_be_bytes()).finalize()
    }
}

/// Writes a file, whole or not at all.
fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), KeyError> {
    let new = path.with_extension("new");
    let write = || {
        match fs::remove_file(&new) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write().map_err(|source| KeyError::File { action: "write", path: path.to_owned(), source })
}

fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use ed25519_dalek::{Signature, Verifier, VerifyingKey};

    use super::*;

    const HERE: Attachment = Attachment { vni: 7, generation: 3 };

    #[test]
    fn a_session_is_one_tenant_s_and_ends() {
        let boot = BootId::of("b");
        let identity = Identity::new([1; 32], "h", &boot);
        let token = identity.open_session(5, HERE, Duration::from_mins(1));
        assert!(identity.is_session(&token, 5, HERE));
        for (slot, attachment) in [
            (6, HERE),
            (5, Attachment { generation: 4, ..HERE }),
            (5, Attachment { vni: 8, ..HERE }),
        ] {
            assert!(!identity.is_session(&token, slot, attachment));
        }
        assert!(!Identity::new([2; 32], "h", &boot).is_session(&token, 5, HERE));
        let next = BootId::of("another");
        assert!(!Identity::new([1; 32], "h", &next).is_session(&token, 5, HERE));
        let over = identity.open_session(5, HERE, Duration::ZERO);
        assert!(!identity.is_session(&over, 5, HERE));
        // Its end cannot be moved.
        let mut bytes = URL_SAFE_NO_PAD.decode(over).unwrap();
        bytes[0] ^= 1;
        assert!(!identity.is_session(&URL_SAFE_NO_PAD.encode(bytes), 5, HERE));
        for garbage in ["", "x", "!", "AAAA"] {
            assert!(!identity.is_session(garbage, 5, HERE));
        }
    }

    #[test]
    fn an_identity_token_is_verified_by_the_key_set() {
        let directory = tempfile::tempdir().unwrap();
        let identity = Identity::open(directory.path(), "host-1", &BootId::of("b")).unwrap();
        let instance = Instance { instance_id: "i-1".into(), ..Instance::default() };
        let token = identity.sign(&instance, "https://db.example");

        let file = fs::read(directory.path().join("jwks.json")).unwrap();
        let set: Value = serde_json::from_slice(&file).unwrap();
        let decode = |text: &str| URL_SAFE_NO_PAD.decode(text).unwrap();
        let public = decode(set["keys"][0]["x"].as_str().unwrap());
        let public = VerifyingKey::from_bytes(&public.try_into().unwrap()).unwrap();
        let (signed, signature) = token.rsplit_once('.').unwrap();
        let signature = Signature::from_slice(&decode(signature)).unwrap();
        public.verify(signed.as_bytes(), &signature).unwrap();
        let (header, claims) = signed.split_once('.').unwrap();
        let header: Value = serde_json::from_slice(&decode(header)).unwrap();
        let claims: Value = serde_json::from_slice(&decode(claims)).unwrap();
        assert_eq!((&header["alg"], &header["kid"]), (&json!("EdDSA"), &set["keys"][0]["kid"]));
        assert_eq!((&claims["iss"], &claims["sub"]), (&json!("host-1"), &json!("i-1")));
        assert_eq!(claims["aud"], "https://db.example");
        let lifetime = claims["exp"].as_u64().unwrap() - claims["iat"].as_u64().unwrap();
        assert_eq!(lifetime, IDENTITY_LIFETIME.as_secs());
    }

    #[test]
    fn the_key_is_kept_and_nobody_else_s_to_read() {
        let directory = tempfile::tempdir().unwrap();
        let boot = BootId::of("b");
        let first = Identity::open(directory.path(), "h", &boot).unwrap();
        let again = Identity::open(directory.path(), "h", &boot).unwrap();
        assert_eq!(first.key_set(), again.key_set());
        let path = directory.path().join("identity.key");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&path, b"short").unwrap();
        let error = Identity::open(directory.path(), "h", &boot).err().unwrap().to_string();
        assert!(error.contains("identity.key") && error.contains("remove it"), "{error}");
    }
}
