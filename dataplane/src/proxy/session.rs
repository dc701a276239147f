//! Whether a node forwards: a session of Seamless BFD (RFC 7880), as its initiator.

use std::time::{Duration, Instant};

use warren_abi::bfd::Control;

/// Between two requests to a node that answers.
pub const INTERVAL: Duration = Duration::from_millis(10);
/// So many requests in a row go unanswered until a node counts as down (RFC 5880, section 6.8.4).
pub const MULTIPLIER: u32 = 3;
/// Between two requests to a node that is down.
const SLOW: Duration = Duration::from_millis(50);
/// So many answers in a row make a node that was down count as up.
const ANSWERS: u32 = 3;
/// For so long, a node that was down once is not trusted; twice as long each time that it is down
/// again within it.
const HOLD: Duration = Duration::from_secs(1);
/// The longest of these times is so many times as long.
const MOST_HOLDS: u32 = 64;

/// Session state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It was not asked often enough.
    Init,
    /// It answers.
    Up,
    /// It does not.
    Down,
}

/// A session with a node.
#[derive(Debug)]
pub struct Session {
    discriminator: u32,
    state: State,
    /// Requests since the last answer, and when the first of them was sent.
    unanswered: u32,
    first: Option<Instant>,
    /// Answers in a row, while it is down.
    answers: u32,
    next: Option<Instant>,
    /// How long a node that is up now is not trusted yet.
    held: Option<(Instant, u32)>,
}

impl Session {
    /// A session, by a number that no other one should have.
    pub fn new(discriminator: u32) -> Self {
        Self {
            discriminator,
            state: State::Init,
            unanswered: 0,
            first: None,
            answers: 0,
            next: None,
            held: None,
        }
    }

    /// What is known.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether a request went unanswered until the next one.
    pub fn is_late(&self) -> bool {
        self.unanswered > 1
    }

    /// The node said something: one that is down is asked anew.
    pub fn spoke(&mut self) {
        if self.state == State::Down {
            (self.state, self.unanswered, self.first, self.next) = (State::Init, 0, None, None);
        }
    }

    /// Whether the node was down a short time ago.
    pub fn is_shaky(&self, now: Instant) -> bool {
        self.held.is_some_and(|(until, _)| now < until)
    }

    /// The request to send now, if one is due.
    pub fn request(&mut self, now: Instant) -> Option<Control> {
        if self.next.is_some_and(|next| now < next) {
            return None;
        }
        let interval = if self.state == State::Down { SLOW } else { INTERVAL };
        // After a delay, requests do not follow each other faster than that.
        self.next = Some(now + interval);
        self.unanswered += 1;
        if self.unanswered > 1 {
            self.answers = 0;
        }
        self.first.get_or_insert(now);
        Some(Control::request(self.discriminator, INTERVAL.as_micros() as u32, MULTIPLIER as u8))
    }

    /// Takes in what came from the node. Whether it is an answer.
    pub fn answered(&mut self, control: &Control) -> bool {
        let asked = Control::request(self.discriminator, 0, 0);
        if control.is_request() || control.yours != asked.mine {
            return false;
        }
        (self.unanswered, self.first) = (0, None);
        self.answers += 1;
        if self.state == State::Init || self.answers >= ANSWERS {
            self.state = State::Up;
        }
        true
    }

    /// Concludes what is to be concluded from answers that did not come: to be called when all that
    /// came are taken in. Whether that is something new.
    pub fn conclude(&mut self, now: Instant) -> bool {
        let limit = INTERVAL * MULTIPLIER;
        let is_late = self.first.is_some_and(|first| now.duration_since(first) >= limit);
        if self.state == State::Down || !is_late || self.unanswered < MULTIPLIER {
            return false;
        }
        (self.state, self.answers) = (State::Down, 0);
        let times = match self.held {
            Some((until, times)) if now < until => (times * 2).min(MOST_HOLDS),
            _ => 1,
        };
        self.held = Some((now + HOLD * times, times));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Node {
        session: Session,
        now: Instant,
    }

    impl Node {
        fn new() -> Self {
            Self { session: Session::new(5), now: Instant::now() }
        }

        /// Ten milliseconds, and whether the node answers.
        fn tick(&mut self, answers: bool) -> bool {
            self.now += INTERVAL;
            if let Some(request) = self.session.request(self.now)
                && answers
            {
                self.session.answered(&request.answer());
            }
            self.session.conclude(self.now)
        }

        fn ticks(&mut self, count: usize, answers: bool) -> Vec<bool> {
            (0..count).map(|_| self.tick(answers)).collect()
        }
    }

    #[test]
    fn a_node_is_down_after_three_requests_and_thirty_milliseconds() {
        let mut node = Node::new();
        node.tick(true);
        assert_eq!(node.session.state(), State::Up);
        assert_eq!(node.ticks(4, false), [false, false, false, true]);
        assert_eq!(node.session.state(), State::Down);
        assert!(node.session.is_shaky(node.now));
    }

    #[test]
    fn who_was_late_itself_does_not_blame_the_other() {
        let mut node = Node::new();
        node.tick(true);
        node.session.request(node.now + INTERVAL);
        node.now += Duration::from_secs(1);
        assert!(!node.session.conclude(node.now));
        assert_eq!(node.ticks(2, true), [false, false]);
        assert_eq!(node.session.state(), State::Up);
    }

    #[test]
    fn a_node_that_comes_back_answers_three_times_and_is_not_trusted_for_a_while() {
        let mut node = Node::new();
        node.ticks(5, false);
        assert_eq!(node.session.state(), State::Down);
        node.ticks(8, true);
        assert_eq!(node.session.state(), State::Down);
        node.ticks(30, true);
        assert_eq!(node.session.state(), State::Up);
        assert!(node.session.is_shaky(node.now));
        node.ticks(100, true);
        assert!(!node.session.is_shaky(node.now));
        node.ticks(4, false);
        node.ticks(40, true);
        node.ticks(4, false);
        assert!(node.session.is_shaky(node.now + HOLD * 3 / 2), "twice as long");
    }

    #[test]
    fn a_node_that_speaks_is_asked_anew() {
        let mut node = Node::new();
        node.ticks(5, false);
        node.session.spoke();
        assert_eq!(node.session.state(), State::Init);
        assert_eq!(node.ticks(4, false), [false, false, false, true], "it does not hear");
        node.session.spoke();
        node.tick(true);
        assert_eq!(node.session.state(), State::Up);
        assert!(node.session.is_shaky(node.now));
    }

    #[test]
    fn an_answer_to_another_counts_for_nothing() {
        let mut node = Node::new();
        node.session.answered(&Control::request(6, 0, 0).answer());
        node.session.answered(&Control::request(5, 0, 0));
        assert_eq!(node.session.state(), State::Init);
    }
}
