//! `warren capture`: what a microVM sends and receives, on both sides of the NAT, as pcapng.

use std::borrow::Cow;
use std::fs::OpenOptions;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use pcap_file::DataLink;
use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketBlock;
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption, InterfaceTsResolution,
};
use pcap_file::pcapng::blocks::interface_statistics::{
    InterfaceStatisticsBlock, InterfaceStatisticsOption,
};
use tonic::Streaming;
use warren_proto::v1::{
    CapturePacketsRequest, CapturePacketsResponse, CaptureSide, CapturedPacket,
};

use crate::args::{CaptureArguments, Output};
use crate::client::Client;
use crate::commands::{print, resolve, unless_closed};
use crate::error::Error;
use crate::render::{self, CaptureRow};

/// The interfaces of the file, in their order.
const INTERFACES: [&str; 2] = ["inside", "outside"];

/// Writes the packets, and tells in the end how many there were.
pub async fn run(
    mut client: Client,
    output: Output,
    arguments: CaptureArguments,
) -> Result<(), Error> {
    let CaptureArguments { instance, filter, count, seconds, write } = arguments;
    let is_stdout = write == Path::new("-");
    if is_stdout && io::stdout().is_terminal() {
        let problem = "-w - writes binary data: direct it to a file or a program";
        return Err(Error::Usage(problem.into()));
    }
    let instance = resolve(&client.instances().await?, &instance)?;
    let filter = filter.unwrap_or_default();
    let request = CapturePacketsRequest {
        instance: instance.clone(),
        filter: filter.clone(),
        count: count.unwrap_or_default(),
        seconds: seconds.unwrap_or_default(),
    };
    let mut messages = client.capture(request).await?;
    // After it was allowed: a wrong filter empties no file.
    let sink: Box<dyn Write + Send> = if is_stdout {
        Box::new(io::stdout())
    } else {
        // Only its owner may read what the microVM says.
        let file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&write);
        let problem = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", write.display()));
        Box::new(file.map_err(problem)?)
    };
    let mut file = File::new(BufWriter::new(sink), &filter)?;
    eprintln!("capturing; Ctrl-C ends it");
    let mut told = CapturePacketsResponse::default();
    let result = tokio::select! {
        result = pass_on(&client, &mut messages, &mut file, &mut told) => result,
        interrupted = tokio::signal::ctrl_c() => {
            told.ended = "interrupted".into();
            interrupted.map_err(Error::from)
        }
    };
    let written = file.finish(&told);
    result?;
    let row = CaptureRow::new(instance, file.packets, &told);
    let row = render::one(output, &row);
    if is_stdout {
        // Whoever reads packets may have had enough.
        unless_closed(written)?;
        eprintln!("{row}");
        return Ok(());
    }
    written?;
    print(&row)
}

/// Writes packets until they end; `told` is what was told beside them last.
async fn pass_on(
    client: &Client,
    messages: &mut Streaming<CapturePacketsResponse>,
    file: &mut File<impl Write>,
    told: &mut CapturePacketsResponse,
) -> Result<(), Error> {
    while told.ended.is_empty() {
        let message = messages.message().await.map_err(|status| client.refused(status))?;
        let message = message.ok_or(Error::Incomplete("the capture's end"))?;
        let CapturePacketsResponse { packets, .. } = &message;
        let written = packets.iter().try_for_each(|packet| file.write(packet));
        if let Err(error) = written.and_then(|()| file.flush()) {
            told.ended = "unread".into();
            return unless_closed(Err(error));
        }
        *told = CapturePacketsResponse { packets: vec![], ..message };
    }
    Ok(())
}

/// A pcapng file (draft-ietf-opsawg-pcapng) of two interfaces.
struct File<W: Write> {
    writer: PcapNgWriter<W>,
    /// Packets of each interface.
    packets: [u64; 2],
    last: Duration,
}

impl<W: Write> File<W> {
    fn new(sink: W, filter: &str) -> io::Result<Self> {
        let mut writer = PcapNgWriter::new(sink).map_err(failed)?;
        for name in INTERFACES {
            let mut options = vec![
                InterfaceDescriptionOption::IfName(name.into()),
                InterfaceDescriptionOption::IfTsResol(InterfaceTsResolution::NANO),
            ];
            if !filter.is_empty() {
                // 0: a filter of libpcap's follows.
                let filter = [&[0], filter.as_bytes()].concat();
                options.push(InterfaceDescriptionOption::IfFilter(filter.into()));
            }
            let linktype = DataLink::ETHERNET;
            let interface = InterfaceDescriptionBlock { linktype, snaplen: 0, options };
            writer.write_pcapng_block(interface).map_err(failed)?;
        }
        Ok(Self { writer, packets: [0; 2], last: Duration::ZERO })
    }

    /// Ignores packets of sides that this version does not know.
    fn write(&mut self, packet: &CapturedPacket) -> io::Result<()> {
        let interface = match packet.side() {
            CaptureSide::Inside => 0,
            CaptureSide::Outside => 1,
            CaptureSide::Unspecified => return Ok(()),
        };
        self.packets[interface] += 1;
        self.last = Duration::from_nanos(packet.unix_ns);
        let block = EnhancedPacketBlock {
            interface_id: interface as u32,
            timestamp: self.last,
            original_len: packet.length,
            data: Cow::Borrowed(&packet.frame),
            options: vec![],
        };
        self.writer.write_pcapng_block(block).map_err(failed)?;
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.get_mut().flush()
    }

    /// Writes what was lost.
    fn finish(&mut self, told: &CapturePacketsResponse) -> io::Result<()> {
        let lost = [told.inside_lost, told.outside_lost];
        for ((interface_id, packets), lost) in (0..).zip(self.packets).zip(lost) {
            let block = InterfaceStatisticsBlock {
                interface_id,
                timestamp: self.last,
                options: vec![
                    InterfaceStatisticsOption::IsbFilterAccept(packets),
                    InterfaceStatisticsOption::IsbOsDrop(lost),
                ],
            };
            self.writer.write_pcapng_block(block).map_err(failed)?;
        }
        self.flush()
    }
}

/// The crate does not export its type of errors; what matters is that of the writer in it.
fn failed(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    match error.source().and_then(|source| source.downcast_ref::<io::Error>()) {
        Some(source) => io::Error::new(source.kind(), source.to_string()),
        None => io::Error::other(error),
    }
}
