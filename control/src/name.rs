//! Names of things: RFC 1123 labels, so that each can stand in a host name, a file name and a URL.

/// Why a text is no name, as a phrase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidName(pub String);

/// One label: 1 to 63 lower-case letters, digits and inner hyphens.
pub fn label(text: &str) -> Result<(), InvalidName> {
    if text.is_empty() {
        return Err(InvalidName("is empty: give it 1 to 63 characters".into()));
    }
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if text.len() > 63 || !text.bytes().all(allowed) || text.starts_with('-') || text.ends_with('-')
    {
        return Err(InvalidName(format!(
            "\"{text}\" is not made of 1 to 63 lower-case letters, digits and inner hyphens"
        )));
    }
    Ok(())
}

/// Labels joined by dots, up to 253 characters: what machines are called.
pub fn host(text: &str) -> Result<(), InvalidName> {
    if text.len() > 253 {
        return Err(InvalidName(format!("has {} characters: at most 253 are allowed", text.len())));
    }
    text.split('.').try_for_each(label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels() {
        for name in ["a", "7", "a-b", "x1--y", &"z".repeat(63)] {
            assert_eq!(label(name), Ok(()), "{name}");
        }
        for name in ["", "-a", "a-", "A", "a_b", "a.b", "ä", "a b", &"z".repeat(64)] {
            assert!(label(name).is_err(), "{name}");
        }
    }

    #[test]
    fn hosts() {
        for name in ["h1", "h1.rack-2.example.com"] {
            assert_eq!(host(name), Ok(()), "{name}");
        }
        for name in ["", ".", "a..b", "a.", "h1/x", &"a.".repeat(130)] {
            assert!(host(name).is_err(), "{name}");
        }
    }
}
