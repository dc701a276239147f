//! The ACPI tables of a Linux guest (ACPI 6.5): hardware-reduced, so without anything of a PC's that
//! is not there. They describe one processor, the virtio devices, the serial port, and how the
//! guest hears that it was cloned.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, ONE, Package, Path,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};
use warren_abi::microvm::{MMIO_BYTES, NET_MMIO};

use super::pc::{
    GENERATION_ADDRESS, GENERATION_GSI, SERIAL_GSI, SERIAL_PORT, SLEEP_PORT, VIRTIO_DEVICES,
    virtio_gsi,
};

/// Where the tables are: in the area of a PC's firmware.
pub const TABLES: u64 = 0xe_0000;

/// The end of that area.
pub const TABLES_END: u64 = 0x10_0000;

const IO_APIC: u32 = 0xfec0_0000;
const LOCAL_APIC: u32 = 0xfee0_0000;

/// Length of a table's header, in bytes (5.2.6).
const HEADER: u32 = 36;

const OEM: [u8; 6] = *b"WARREN";
const MODEL: [u8; 8] = *b"MICROVM ";
const REVISION: u32 = 1;

/// Writes the tables; returns where the first one is (RSDP).
pub fn write(memory: &GuestMemoryMmap) -> Result<u64, GuestMemoryError> {
    let mut next = TABLES + Rsdp::len() as u64;
    let mut place = |table: &dyn Aml| -> Result<u64, GuestMemoryError> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let at = next.next_multiple_of(16);
        next = at + bytes.len() as u64;
        memory.write_slice(&bytes, GuestAddress(at))?;
        Ok(at)
    };
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, 2, OEM, MODEL, REVISION);
    dsdt.append_slice(&definitions());
    let dsdt = place(&dsdt)?;

    let register =
        |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM, MODEL, REVISION);
    fadt.sleep_control_reg = register(SLEEP_PORT);
    fadt.sleep_status_reg = register(SLEEP_PORT);
    let fadt = fadt.dsdt_64(dsdt).flag(Flags::HwReducedAcpi);
    let fadt = place(&fadt.finalize())?;

    let mut madt = MADT::new(OEM, MODEL, REVISION, LocalInterruptController::Address(LOCAL_APIC));
    madt.add_structure(ProcessorLocalApic::new(0, 0, EnabledStatus::Enabled));
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    let madt = place(&madt)?;

    let mut xsdt = XSDT::new(OEM, MODEL, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&xsdt)?;

    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    memory.write_slice(&rsdp, GuestAddress(TABLES))?;
    Ok(TABLES)
}

/// The content of the DSDT.
fn definitions() -> Vec<u8> {
    let mut bytes = Vec::new();
    (0..VIRTIO_DEVICES).for_each(|index| virtio(index, &mut bytes));
    serial(&mut bytes);
    generation(&mut bytes);
    // Sleep type 5 is written to the sleep control register to power off (7.4.2).
    Name::new("_S5_".into(), &Package::new(vec![&5u8])).to_aml_bytes(&mut bytes);
    bytes
}

/// A virtio-mmio device, by the identifier that Linux' driver has.
fn virtio(index: u8, bytes: &mut Vec<u8>) {
    let registers = NET_MMIO + u64::from(index) * MMIO_BYTES;
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            Path::new(&format!("VR{index:02}")),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &index),
                &Name::new("_CCA".into(), &ONE),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, registers as u32, MMIO_BYTES as u32),
                        &edge(virtio_gsi(index)),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(bytes);
}

/// COM1.
fn serial(bytes: &mut Vec<u8>) {
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8),
                        &edge(SERIAL_GSI),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(bytes);
}

/// The virtual machine generation identifier ("Virtual Machine Generation ID", Microsoft 2018), and
/// the event device (5.6.9) that says when it changed.
fn generation(bytes: &mut Vec<u8>) {
    let (low, high) = (GENERATION_ADDRESS as u32, (GENERATION_ADDRESS >> 32) as u32);
    Scope::new(
        "_SB_".into(),
        vec![
            &Device::new(
                "VGEN".into(),
                vec![
                    &Name::new("_HID".into(), &"WRRN0001"),
                    // Linux knows the shorter one, others the specification's.
                    &Name::new("_CID".into(), &Package::new(vec![&"VMGENCTR", &"VM_Gen_Counter"])),
                    &Name::new("_DDN".into(), &"VM_Gen_Counter"),
                    &Name::new("_UID".into(), &ZERO),
                    &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
                ],
            ),
            &Device::new(
                "GED_".into(),
                vec![
                    &Name::new("_HID".into(), &"ACPI0013"),
                    &Name::new("_UID".into(), &ZERO),
                    &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&edge(GENERATION_GSI)])),
                    &Method::new(
                        "_EVT".into(),
                        1,
                        true,
                        vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &0x80u8)],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(bytes);
}

/// An interrupt that nobody shares, raised by going up.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    /// A table's bytes.
    fn table(memory: &GuestMemoryMmap, at: u64) -> Vec<u8> {
        let length: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        let mut bytes = vec![0; length as usize];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn each_table_is_found_whole_from_the_first_one() {
        let end = GuestAddress(TABLES_END);
        let memory =
            GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), end.0 as usize)]).unwrap();
        let rsdp = write(&memory).unwrap();
        let mut bytes = [0; 36];
        memory.read_slice(&mut bytes, GuestAddress(rsdp)).unwrap();
        assert_eq!((&bytes[..8], sum(&bytes[..20]), sum(&bytes)), (&b"RSD PTR "[..], 0, 0));
        let xsdt = table(&memory, u64::from_le_bytes(bytes[24..32].try_into().unwrap()));
        assert_eq!((&xsdt[..4], sum(&xsdt)), (&b"XSDT"[..], 0));
        let entries: Vec<_> = xsdt[36..]
            .chunks_exact(8)
            .map(|entry| table(&memory, u64::from_le_bytes(entry.try_into().unwrap())))
            .collect();
        let names: Vec<_> = entries.iter().map(|entry| &entry[..4]).collect();
        assert_eq!(names, [b"FACP", b"APIC"]);
        assert!(entries.iter().all(|entry| sum(entry) == 0));
        // X_DSDT (5.2.9).
        let dsdt = table(&memory, u64::from_le_bytes(entries[0][140..148].try_into().unwrap()));
        assert_eq!((&dsdt[..4], sum(&dsdt)), (&b"DSDT"[..], 0));
    }
}
