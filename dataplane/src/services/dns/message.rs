//! Queries and answers: which are taken, what they become, and how long they hold. Without I/O.

use std::time::{Duration, Instant};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::CNAME;
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use super::super::stack::DATAGRAM;

/// The longest that an answer is kept: a day (RFC 8767, section 4, advises at most a week).
const LONGEST: u32 = 86_400;
/// The longest that it is kept that there is no answer: 3 hours (RFC 2308, section 5).
const LONGEST_NEGATIVE: u32 = 3 * 3600;
/// How long a failure is kept (RFC 9520, section 3.2, demands at least 1 s).
const FAILURE: u32 = 1;
/// Longest answer over UDP to who did not say more (RFC 1035, section 4.2.1).
const PLAIN_DATAGRAM: usize = 512;
/// Longest answer over TCP.
pub const STREAM: usize = u16::MAX as usize;

/// What an answer is kept under.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Name, in lower case, with its root.
    pub name: Name,
    /// Type.
    pub kind: RecordType,
    /// DNSSEC's records are wanted.
    pub dnssec_ok: bool,
    /// The resolver shall not validate.
    pub checking_disabled: bool,
}

/// A guest's question.
#[derive(Clone, Debug)]
pub struct Question {
    /// What it is about.
    pub key: Key,
    id: u16,
    query: Query,
    recursion_desired: bool,
    /// The longest datagram that the guest takes, if it speaks EDNS.
    datagram: Option<u16>,
}

impl Question {
    /// Reads a guest's message. What is no question is no reason to be silent, as far as it is a
    /// message at all: the error is what to answer, if anything.
    pub fn read(bytes: &[u8]) -> Result<Self, Option<Vec<u8>>> {
        let Some(&[high, low, flags, _]) = bytes.first_chunk() else { return Err(None) };
        let id = u16::from_be_bytes([high, low]);
        let is_response = flags & 0x80 != 0;
        if is_response || bytes.len() < 12 {
            return Err(None);
        }
        let refuse = |op_code, code| {
            let refusal = Message::error_msg(id, op_code, code);
            Err(refusal.to_vec().ok())
        };
        let Ok(mut message) = Message::from_vec(bytes) else {
            return refuse(OpCode::Query, ResponseCode::FormErr);
        };
        let metadata = message.metadata;
        if metadata.op_code != OpCode::Query {
            return refuse(metadata.op_code, ResponseCode::NotImp);
        }
        if message.version() != 0 {
            return refuse(OpCode::Query, ResponseCode::BADVERS);
        }
        let (Some(query), true) = (message.queries.pop(), message.queries.is_empty()) else {
            return refuse(OpCode::Query, ResponseCode::FormErr);
        };
        let is_transfer = matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR);
        if query.query_class() != DNSClass::IN || is_transfer {
            return refuse(OpCode::Query, ResponseCode::Refused);
        }
        let edns = message.edns.as_ref();
        let mut name = query.name().to_lowercase();
        name.set_fqdn(true);
        let key = Key {
            name,
            kind: query.query_type(),
            dnssec_ok: edns.is_some_and(|edns| edns.flags().dnssec_ok),
            checking_disabled: metadata.checking_disabled,
        };
        let recursion_desired = metadata.recursion_desired;
        Ok(Self { key, id, query, recursion_desired, datagram: edns.map(Edns::max_payload) })
    }

    /// The longest answer that the guest takes over UDP, in bytes.
    pub fn datagram(&self) -> usize {
        self.datagram.map_or(PLAIN_DATAGRAM, |size| usize::from(size).clamp(512, DATAGRAM))
    }

    /// The answer for this guest, at most so many bytes long: if it does not fit, its beginning
    /// with the mark that tells it to come by TCP.
    pub fn reply(&self, answer: &Answer, limit: usize) -> Option<Vec<u8>> {
        let mut reply = Message::response(self.id, OpCode::Query);
        reply.metadata.recursion_desired = self.recursion_desired;
        reply.metadata.recursion_available = true;
        reply.metadata.checking_disabled = self.key.checking_disabled;
        reply.metadata.authentic_data = answer.message.metadata.authentic_data;
        reply.metadata.response_code = answer.code();
        reply.add_query(self.query.clone());
        if self.datagram.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(DATAGRAM as u16).set_dnssec_ok(self.key.dnssec_ok);
            reply.set_edns(edns);
        } else if u16::from(answer.code()) > 15 {
            // It has no bits for the rest of the code.
            reply.metadata.response_code = ResponseCode::ServFail;
        }
        let age = answer.age();
        let aged = |records: &[Record]| -> Vec<Record> {
            let mut records = records.to_vec();
            for record in &mut records {
                record.decrement_ttl(age);
            }
            records
        };
        reply.answers = aged(&answer.message.answers);
        reply.authorities = aged(&answer.message.authorities);
        reply.additionals = aged(&answer.message.additionals);
        let bytes = reply.to_vec().ok()?;
        if bytes.len() <= limit { Some(bytes) } else { reply.truncate().to_vec().ok() }
    }
}

/// The names that are asked for one after another, until one exists: a name of one label is looked
/// for in the search domain first.
///
/// A guest's own stub resolver may search as well (RFC 1123, section 6.1.4.3), and then finds the
/// name at its first attempt; but not every guest has one.
pub fn candidates(name: &Name, search_domain: Option<&Name>) -> Vec<Name> {
    let searched = match search_domain {
        Some(domain) if name.num_labels() == 1 => name.clone().append_domain(domain).ok(),
        _ => None,
    };
    searched.into_iter().chain([name.clone()]).collect()
}

/// What a resolver answered, or that it did not.
#[derive(Clone, Debug)]
pub struct Answer {
    message: Message,
    received: Instant,
    /// How long it holds from then on, in seconds.
    lifetime: u32,
}

impl Answer {
    /// What the resolver answered to this question, now.
    pub fn new(key: &Key, message: Message) -> Self {
        let lifetime = lifetime(key.kind, &message);
        Self { message, received: Instant::now(), lifetime }
    }

    /// An error of the forwarder's own.
    pub fn error(code: ResponseCode) -> Self {
        let message = Message::error_msg(0, OpCode::Query, code);
        Self { message, received: Instant::now(), lifetime: FAILURE }
    }

    /// Says that it is the answer for another name, which stands for its own: what a search found.
    #[must_use]
    pub fn alias(mut self, from: &Name, to: &Name) -> Self {
        let ttl = self.message.answers.iter().map(|record| record.ttl).min();
        let alias = RData::CNAME(CNAME(to.clone()));
        let ttl = ttl.unwrap_or(self.lifetime);
        self.message.answers.insert(0, Record::from_rdata(from.clone(), ttl, alias));
        self
    }

    /// Response code.
    pub fn code(&self) -> ResponseCode {
        self.message.metadata.response_code
    }

    /// How long it holds.
    pub fn lifetime(&self) -> Duration {
        Duration::from_secs(self.lifetime.into())
    }

    /// About how much memory it takes, in bytes.
    pub fn weight(&self) -> u32 {
        let records = self.message.all_sections().count() as u32;
        512 + 256 * records
    }

    fn age(&self) -> u32 {
        self.received.elapsed().as_secs() as u32
    }
}

/// How long an answer holds, in seconds (RFC 1035, section 3.2.1; RFC 2308, section 5).
fn lifetime(kind: RecordType, message: &Message) -> u32 {
    let code = message.metadata.response_code;
    if !matches!(code, ResponseCode::NoError | ResponseCode::NXDomain) {
        return FAILURE;
    }
    let shortest = message.all_sections().map(|record| record.ttl).min().unwrap_or(LONGEST);
    let has_answer = |record: &Record| record.record_type() == kind || kind == RecordType::ANY;
    if code == ResponseCode::NoError && message.answers.iter().any(has_answer) {
        return shortest.min(LONGEST);
    }
    let minimum = message.authorities.iter().find_map(|record| match &record.data {
        RData::SOA(soa) => Some(soa.minimum.min(record.ttl)),
        _ => None,
    });
    // Without the zone's word, nobody knows how long there is nothing.
    minimum.map_or(0, |minimum| minimum.min(shortest).min(LONGEST_NEGATIVE))
}

/// The query that a resolver is asked, under a random id (RFC 5452, section 9.2).
pub fn query(key: &Key, with_edns: bool) -> Message {
    let mut message = Message::new(rand::random(), MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.metadata.checking_disabled = key.checking_disabled;
    message.add_query(Query::query(key.name.clone(), key.kind));
    if with_edns {
        // Of the guest's EDNS only what is not for its next hop alone (RFC 6891, section 6.2.6).
        let mut edns = Edns::new();
        edns.set_max_payload(DATAGRAM as u16).set_dnssec_ok(key.dnssec_ok);
        message.set_edns(edns);
    }
    message
}

/// The answer to `query` that these bytes are, if they are (RFC 5452, section 9.1).
pub fn answer_to(query: &Message, bytes: &[u8]) -> Option<Message> {
    let message = Message::from_vec(bytes).ok()?;
    let is_answer = message.metadata.message_type == MessageType::Response
        && message.metadata.id == query.metadata.id
        && message.metadata.op_code == OpCode::Query
        && message.queries == query.queries;
    is_answer.then_some(message)
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use hickory_proto::rr::rdata::{A, SOA};
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> Name {
        Name::from_str(text).unwrap()
    }

    fn key(text: &str) -> Key {
        let (name, kind) = (name(text), RecordType::A);
        Key { name, kind, dnssec_ok: false, checking_disabled: false }
    }

    fn address(owner: &str, ttl: u32) -> Record {
        Record::from_rdata(name(owner), ttl, RData::A(A::new(10, 0, 0, 1)))
    }

    fn answered(code: ResponseCode, answers: Vec<Record>, soa: Option<(u32, u32)>) -> Message {
        let mut message = Message::error_msg(1, OpCode::Query, code);
        message.answers = answers;
        message.authorities = soa
            .map(|(ttl, minimum)| {
                let soa = SOA::new(name("ns."), name("admin."), 1, 1, 1, 1, minimum);
                Record::from_rdata(name("example."), ttl, RData::SOA(soa))
            })
            .into_iter()
            .collect();
        message
    }

    #[test]
    fn answers_hold_as_long_as_their_zone_says() {
        use ResponseCode::{NXDomain, NoError, ServFail};
        let both = vec![address("a.", 60), address("a.", 30)];
        let alias = RData::CNAME(CNAME(name("b.")));
        let alias = vec![Record::from_rdata(name("a."), 20, alias)];
        for (expected, code, answers, soa) in [
            (30, NoError, both.clone(), None),
            (10, NoError, both, Some((10, 5))),
            (LONGEST, NoError, vec![address("a.", u32::MAX)], None),
            (7, NXDomain, vec![], Some((300, 7))),
            (5, NXDomain, vec![], Some((5, 300))),
            (LONGEST_NEGATIVE, NXDomain, vec![], Some((u32::MAX, u32::MAX))),
            (0, NXDomain, vec![], None),
            (9, NoError, vec![], Some((9, 300))),
            (0, NoError, vec![], None),
            (4, NoError, alias.clone(), Some((300, 4))),
            (0, NoError, alias, None),
            (FAILURE, ServFail, vec![], Some((300, 300))),
        ] {
            let message = answered(code, answers, soa);
            assert_eq!(lifetime(RecordType::A, &message), expected, "{message:?}");
        }
    }

    #[test]
    fn names_of_one_label_are_searched_for() {
        let domain = name("corp.internal.");
        let search = |text: &str| {
            let found = candidates(&name(text), Some(&domain));
            found.iter().map(Name::to_ascii).collect::<Vec<_>>()
        };
        assert_eq!(search("db."), ["db.corp.internal.", "db."]);
        assert_eq!(search("db.other."), ["db.other."]);
        assert_eq!(search("."), ["."]);
        assert_eq!(candidates(&name("db."), None), [name("db.")]);
    }

    #[test]
    fn what_does_not_fit_is_marked() {
        let query = query(&key("a."), false).to_vec().unwrap();
        let question = Question::read(&query).unwrap();
        assert_eq!(question.datagram(), 512);
        let many = vec![address("a.", 60); 40];
        let answer = Answer::new(&question.key, answered(ResponseCode::NoError, many, None));
        let short = question.reply(&answer, question.datagram()).unwrap();
        let message = Message::from_vec(&short).unwrap();
        assert!(message.metadata.truncation && message.answers.is_empty());
        let long = question.reply(&answer, STREAM).unwrap();
        let message = Message::from_vec(&long).unwrap();
        assert!(!message.metadata.truncation);
        assert_eq!((message.answers.len(), message.queries), (40, vec![question.query]));
    }

    #[test]
    fn only_the_answer_to_a_query_is_taken_for_it() {
        let query = query(&key("a."), true);
        let mut right = query.clone().into_response();
        right.add_answer(address("a.", 60));
        let bytes = |message: &Message| message.to_vec().unwrap();
        assert!(answer_to(&query, &bytes(&right)).is_some());
        assert!(answer_to(&query, &bytes(&query)).is_none(), "a query is no answer");
        let mut other = right.clone();
        other.metadata.id ^= 1;
        assert!(answer_to(&query, &bytes(&other)).is_none());
        let mut other = right.clone();
        other.queries = vec![Query::query(name("b."), RecordType::A)];
        assert!(answer_to(&query, &bytes(&other)).is_none());
        let mut other = right;
        other.queries.clear();
        assert!(answer_to(&query, &bytes(&other)).is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_question_or_refused_or_ignored(
            bytes in prop::collection::vec(any::<u8>(), 0..600),
        ) {
            check(&bytes)?;
        }

        #[test]
        fn a_broken_query_is_a_question_or_refused_or_ignored(
            changes in prop::collection::vec((0usize..64, any::<u8>()), 1..8),
            length in 0usize..64,
        ) {
            let mut bytes = query(&key("www.example.com."), true).to_vec().unwrap();
            for (index, byte) in changes {
                if let Some(place) = bytes.get_mut(index) {
                    *place = byte;
                }
            }
            bytes.truncate(length.max(12));
            check(&bytes)?;
        }
    }

    /// Whatever is said to these bytes, it is a response to whoever sent them.
    fn check(bytes: &[u8]) -> Result<(), TestCaseError> {
        let reply = match Question::read(bytes) {
            Ok(question) => {
                let answer = Answer::error(ResponseCode::ServFail);
                let reply = question.reply(&answer, question.datagram());
                prop_assert!(reply.is_some());
                reply
            }
            Err(reply) => reply,
        };
        if let Some(reply) = reply {
            prop_assert_eq!(&reply[..2], &bytes[..2]);
            prop_assert!(bytes[2] & 0x80 == 0, "a response was answered");
            let message = Message::from_vec(&reply);
            let is_response =
                message.is_ok_and(|m| m.metadata.message_type == MessageType::Response);
            prop_assert!(is_response);
        }
        Ok(())
    }
}
