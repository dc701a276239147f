//! Times as people write them.

use std::str::FromStr;

use jiff::SignedDuration;

/// Such as 500ms, 3s or 2m.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Milliseconds(pub u32);

impl FromStr for Milliseconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let duration: Option<SignedDuration> = text.parse().ok();
        let ms = duration.and_then(|duration| u32::try_from(duration.as_millis()).ok());
        let ms = ms.filter(|ms| *ms > 0);
        ms.map(Self).ok_or_else(|| "write a time such as 500ms, 3s or 2m".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        let ms = |text: &str| text.parse().map(|Milliseconds(ms)| ms);
        assert_eq!((ms("500ms"), ms("3s"), ms("2m")), (Ok(500), Ok(3000), Ok(120_000)));
        for text in ["", "3", "0s", "-1s", "10us", "9999h"] {
            assert!(ms(text).unwrap_err().contains("500ms"), "{text}");
        }
    }
}
