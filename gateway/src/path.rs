//! A path as triggers are compared with it: whole segments, decoded, without tricks. Pure.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;

/// A path whose segments are decoded, but for encoded slashes, which part nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NormalPath<'a>(Cow<'a, str>);

impl<'a> NormalPath<'a> {
    /// Of a path as it was sent, without its query. The error says what is wrong with it.
    ///
    /// Segments `.` and `..`, encoded or not, are refused rather than resolved: whoever resolves
    /// them later might do so differently.
    pub fn new(path: &'a str) -> Result<Self, &'static str> {
        let path = match path {
            "" => "/",
            "*" => return Err("it is \"*\", which no function answers"),
            path if !path.starts_with('/') => return Err("it does not begin with /"),
            path => path,
        };
        let normal = if path.contains('%') { decode(path)?.into() } else { Cow::Borrowed(path) };
        if normal.contains('\0') {
            return Err("it has an encoded zero byte");
        }
        if normal.split('/').any(|segment| segment == "." || segment == "..") {
            return Err("it has a segment . or ..");
        }
        Ok(Self(normal))
    }

    /// Itself as the prefix of others: without slashes at its end.
    pub fn as_prefix(&self) -> &str {
        self.0.trim_end_matches('/')
    }

    /// Its prefixes of whole segments, the longest first, of at most `deepest` segments; the last
    /// one is empty.
    pub fn prefixes(&self, deepest: usize) -> impl Iterator<Item = &str> {
        let path: &str = &self.0;
        let mut ends = path.match_indices('/').map(|(index, _)| index).skip(1);
        let cut = match deepest {
            0 => 0,
            _ => ends.nth(deepest - 1).unwrap_or(path.len()),
        };
        std::iter::successors(Some(&path[..cut]), |longer| {
            longer.rfind('/').map(|slash| &longer[..slash])
        })
    }
}

fn decode(path: &str) -> Result<String, &'static str> {
    let mut normal = String::with_capacity(path.len());
    for segment in path[1..].split('/') {
        let well_formed = segment
            .split('%')
            .skip(1)
            .all(|rest| rest.len() >= 2 && rest.as_bytes()[..2].iter().all(u8::is_ascii_hexdigit));
        if !well_formed {
            return Err("it has a % without two hexadecimal digits");
        }
        let decoded = percent_decode_str(segment).decode_utf8();
        let decoded = decoded.map_err(|_| "its encoded bytes are not UTF-8")?;
        normal.push('/');
        normal.push_str(&decoded.replace('/', "%2F"));
    }
    Ok(normal)
}

/// The path without its first `segments`, as it was sent.
pub fn without_first(path: &str, segments: usize) -> &str {
    if segments == 0 {
        return path;
    }
    path.match_indices('/').nth(segments).map_or("/", |(slash, _)| &path[slash..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_whole_segments_the_longest_first() {
        let path = NormalPath::new("/a/b/c").unwrap();
        let prefixes = |deepest| path.prefixes(deepest).collect::<Vec<_>>();
        assert_eq!(prefixes(9), ["/a/b/c", "/a/b", "/a", ""]);
        assert_eq!(prefixes(3), ["/a/b/c", "/a/b", "/a", ""]);
        assert_eq!(prefixes(1), ["/a", ""]);
        assert_eq!(prefixes(0), [""]);
        let slash = NormalPath::new("/a/").unwrap();
        assert_eq!(slash.prefixes(9).collect::<Vec<_>>(), ["/a/", "/a", ""]);
    }

    #[test]
    fn encodings_are_decoded_and_slashes_among_them_part_nothing() {
        assert_eq!(NormalPath::new("/%61%20/b").unwrap().as_prefix(), "/a /b");
        assert_eq!(NormalPath::new("/a%2fb").unwrap().as_prefix(), "/a%2Fb");
    }

    #[test]
    fn what_could_climb_out_of_a_prefix_is_refused() {
        for path in [
            "/a/../b",
            "/a/%2e%2E/b",
            "/a/.%2e",
            "/./a",
            "/%",
            "/%4",
            "/%zz",
            "/%ff",
            "/%00",
            "a",
            "*",
        ] {
            assert!(NormalPath::new(path).is_err(), "{path}");
        }
        assert!(NormalPath::new("/a/..b/...").is_ok());
    }

    #[test]
    fn the_first_segments_are_taken_away_as_they_were_sent() {
        assert_eq!(without_first("/a/b%20c/d/", 1), "/b%20c/d/");
        assert_eq!(without_first("/a/b", 0), "/a/b");
        assert_eq!(without_first("/a", 1), "/");
        assert_eq!(without_first("/a/", 1), "/");
        assert_eq!(without_first("/a//b", 1), "//b");
    }
}
