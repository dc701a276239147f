//! What the verifier's work and the programs' size may grow to: growth is seen here first.

use warren_abi::maps::programs;

use crate::run::Programs;

/// A program, and the most of it.
struct Budget {
    program: &'static str,
    /// Instructions that the verifier goes through; the kernel refuses a million.
    verified: u32,
    /// Bytes of eBPF, and of machine code.
    translated: u32,
    jited: u32,
}

/// A third above what they were when this was last looked at. Raise one with the reason in the
/// commit's message.
const BUDGETS: [Budget; 32] = [
    Budget { program: programs::TAP, verified: 85_000, translated: 69_000, jited: 40_000 },
    Budget { program: programs::TUNNEL_HOST, verified: 51_000, translated: 43_700, jited: 25_700 },
    Budget { program: programs::TUNNEL_PROXY, verified: 11_600, translated: 26_000, jited: 15_200 },
    Budget { program: programs::VPC, verified: 14_500, translated: 25_900, jited: 15_000 },
    Budget { program: programs::VPC_EGRESS, verified: 390, translated: 2_300, jited: 1_260 },
    Budget { program: programs::SWEEP, verified: 5_800, translated: 16_100, jited: 9_060 },
    Budget { program: programs::TAP_V6, verified: 66_900, translated: 72_000, jited: 43_000 },
    Budget { program: programs::TRANSLATE_V6, verified: 7_800, translated: 8_500, jited: 4_750 },
    Budget { program: programs::TO_GUEST_V6, verified: 52_400, translated: 44_600, jited: 26_000 },
    Budget { program: programs::ERROR_TO_VPC, verified: 38_600, translated: 14_100, jited: 7_800 },
    Budget { program: programs::RESOLVE_V6, verified: 3_400, translated: 6_700, jited: 4_000 },
    Budget { program: programs::ANSWER, verified: 1_500, translated: 8_200, jited: 4_700 },
    Budget { program: programs::ANSWER_V6, verified: 4_600, translated: 16_500, jited: 9_600 },
    Budget {
        program: programs::FRAGMENTS_FIRST,
        verified: 68_000,
        translated: 67_000,
        jited: 39_400,
    },
    Budget {
        program: programs::FRAGMENTS_REST,
        verified: 101_000,
        translated: 48_300,
        jited: 27_900,
    },
    Budget {
        program: programs::FRAGMENTS_PROXY,
        verified: 14_700,
        translated: 35_000,
        jited: 19_500,
    },
    Budget {
        program: programs::FRAGMENTS_FIRST_V6,
        verified: 57_300,
        translated: 66_800,
        jited: 40_200,
    },
    Budget {
        program: programs::TRANSLATE_FIRST_V6,
        verified: 8_670,
        translated: 9_900,
        jited: 5_650,
    },
    Budget {
        program: programs::FRAGMENTS_REST_V6,
        verified: 6_140,
        translated: 13_800,
        jited: 7_970,
    },
    Budget {
        program: programs::FRAGMENTS_TO_GUEST_V6,
        verified: 4_840,
        translated: 11_300,
        jited: 6_630,
    },
    Budget {
        program: programs::FIRST_TO_GUEST_V6,
        verified: 74_800,
        translated: 38_200,
        jited: 22_100,
    },
    Budget {
        program: programs::FRAGMENTS_PROXY_V6,
        verified: 17_500,
        translated: 37_700,
        jited: 22_200,
    },
    Budget {
        program: programs::ERROR_TO_VPC_V6,
        verified: 34_400,
        translated: 17_700,
        jited: 10_100,
    },
    Budget { program: programs::SERVICES, verified: 86_300, translated: 63_800, jited: 38_100 },
    Budget {
        program: programs::UNDERLAY_HOST,
        verified: 68_500,
        translated: 52_200,
        jited: 30_600,
    },
    Budget {
        program: programs::UNDERLAY_PROXY,
        verified: 32_000,
        translated: 31_000,
        jited: 18_000,
    },
    Budget { program: programs::PUBLIC_OUT, verified: 5_470, translated: 13_400, jited: 7_730 },
    Budget { program: programs::PUBLIC_OUT_V6, verified: 7_570, translated: 17_400, jited: 10_200 },
    Budget { program: programs::PUBLIC_IN, verified: 5_730, translated: 14_100, jited: 8_140 },
    Budget { program: programs::PUBLIC_IN_V6, verified: 8_210, translated: 17_200, jited: 10_400 },
    Budget { program: programs::NODE_HOST, verified: 21_400, translated: 7_100, jited: 4_050 },
    Budget { program: programs::NODE_PROXY, verified: 420, translated: 3_250, jited: 1_880 },
];

#[test]
fn programs_stay_within_their_budgets() {
    for program in programs::OF_HOST.into_iter().chain(programs::OF_PROXY) {
        assert!(BUDGETS.iter().any(|budget| budget.program == program), "{program} has none");
    }
    let mut all = Programs::load();
    let mut over = String::new();
    for Budget { program, verified, translated, jited } in BUDGETS {
        let info = all.program(program).info().expect("the kernel tells of its programs");
        let found = [
            ("verified instructions", info.verified_instruction_count(), verified),
            ("bytes of eBPF", info.size_translated(), translated),
            ("bytes of machine code", Some(info.size_jitted()), jited),
        ];
        for (what, found, budget) in found {
            let found = found.expect("this kernel counts it");
            if found > budget {
                over += &format!("{program}: {found} {what}, {budget} budgeted\n");
            }
        }
    }
    assert!(over.is_empty(), "{over}");
}
