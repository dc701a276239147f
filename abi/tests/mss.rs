//! The MSS option, in whatever options there are.

use proptest::prelude::*;
use warren_abi::mss::{OPTIONS_ROOM, find, of_mtu};

fn find_in(options: &[u8]) -> Option<usize> {
    let mut room = [0; OPTIONS_ROOM];
    room[..options.len()].copy_from_slice(options);
    let mss = find(&room, options.len())?;
    assert_eq!(mss.value.0.to_ne_bytes(), options[mss.at..mss.at + 2]);
    Some(mss.at)
}

/// An option that is not the MSS: no operation, or one of another kind.
fn other() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        Just(vec![1]),
        (3u8.., prop::collection::vec(any::<u8>(), 0..8))
            .prop_map(|(kind, value)| { [vec![kind, value.len() as u8 + 2], value].concat() }),
    ]
}

proptest! {
    #[test]
    fn it_is_found_behind_whatever_options(
        others in prop::collection::vec(other(), 0..36),
        value: u16,
    ) {
        let mut options = others.concat();
        prop_assume!(options.len() <= 36);
        let at = options.len() + 2;
        options.extend([2, 4]);
        options.extend(value.to_be_bytes());
        prop_assert_eq!(find_in(&options), Some(at));
        // Cut off, it is not there.
        options.pop();
        prop_assert_eq!(find_in(&options), None);
    }

    #[test]
    fn what_is_found_is_an_mss_option(options in prop::collection::vec(any::<u8>(), 0..=40)) {
        if let Some(at) = find_in(&options) {
            prop_assert!(at + 2 <= options.len());
            prop_assert_eq!(&options[at - 2..at], &[2, 4]);
        }
    }
}

#[test]
fn it_is_not_looked_for_behind_the_end_or_what_is_malformed() {
    for options in [
        [0, 1, 1, 1, 2, 4, 5, 180],
        [3, 0, 1, 1, 2, 4, 5, 180],
        [3, 1, 1, 1, 2, 4, 5, 180],
        [3, 255, 1, 1, 2, 4, 5, 180],
        [2, 0, 1, 1, 2, 4, 5, 180],
    ] {
        assert_eq!(find_in(&options), None, "{options:?}");
    }
    assert_eq!(find_in(&[]), None);
}

#[test]
fn a_segment_leaves_room_for_its_headers() {
    assert_eq!((of_mtu(1450, 20), of_mtu(1430, 40)), (1410, 1370));
    assert_eq!((of_mtu(40, 20), of_mtu(0, 40)), (0, 0));
}
