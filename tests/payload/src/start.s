# Entry points, descriptor tables, page tables and interrupt stubs.
#
# On a KVM without hardware support (PVM) privilege level 0 is interpreted at about a million
# instructions a second and level 3 in long mode runs natively. So everything that can be is laid
# out at link time, the code below is as short as it gets, and main runs at level 3, with a page
# table that gives it RAM and all of the MMIO window, and a TSS whose bitmap gives it the ports. (Not
# IOPL 3, which PVM forgets on the way.)

# --- Xen's note with the 32-bit entry (PVH boot ABI) -------------------------------------------
.section .note.Xen, "a", @note
    .long 4, 4, 18                  # name size, value size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start32

.section .boot, "ax"

# --- PVH: 32-bit protected mode, paging off, ebx = hvm_start_info ------------------------------
.code32
start32:
    lgdt [gdt_pointer]
    mov eax, 0x620                  # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080             # EFER.LME
    mov eax, 0x100
    xor edx, edx
    wrmsr
    mov eax, 0x80000033             # PG, NE, ET, MP, PE
    mov cr0, eax
    ljmp 0x08, offset start32_long
.code64
start32_long:
    mov r12d, ebx
    mov r13d, 1
    jmp tables

# --- Linux boot protocol, 64-bit entry: rsi = boot_params --------------------------------------
.globl start64
start64:
    mov r12, rsi
    xor r13d, r13d
    lgdt [gdt_pointer]
    mov eax, offset pml4
    mov cr3, rax
    mov eax, 0x620
    mov cr4, rax
    mov eax, 0x80000033
    mov cr0, rax
tables:
    mov eax, offset task_state      # the base of a TSS descriptor is scattered
    mov [gdt_task + 2], ax
    shr eax, 16
    mov [gdt_task + 4], al
    mov [gdt_task + 7], ah
    mov eax, 0x28
    ltr ax
    lidt [idt_pointer]
    mov esp, offset kernel_stack_top
    push 0x23
    push offset user_stack_top
    push 2                          # interrupts off
    push 0x1b
    push offset start_user
    iretq
start_user:
    mov rdi, r12
    mov rsi, r13
    call payload_main
    ud2

# --- Exceptions: note what happened and go on at level 3 in payload_fault ----------------------
.globl exception_stubs
.balign 16
exception_stubs:
.set vector, 0
.rept 32
    .balign 16
    .if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21)
    .else
        push 0                      # where the processor pushes no error code
    .endif
    .byte 0x6a, vector              # push vector
    jmp fault
    .set vector, vector + 1
.endr
fault:
    pop [fault_info]                # vector
    pop [fault_info + 8]            # error code
    pop [fault_info + 16]           # rip
    mov rax, cr2
    mov [fault_info + 24], rax
    push offset fault_user
    iretq
fault_user:
    mov esp, offset user_stack_top
    call payload_fault
    ud2

# --- Interrupts: count, end of interrupt -------------------------------------------------------
.globl interrupt_stub
.balign 16
interrupt_stub:
    inc qword ptr [interrupt_count]
    push rax
    mov eax, 0xfee000b0
    mov dword ptr [rax], 0
    pop rax
    iretq

# --- The gate: what only level 0 may do. edi says which, esi is an argument, rax the result ------
# PVM has no software interrupts, so the gate is an undefined instruction at a known address.
.globl gate, gate_stub
.balign 16
gate:
    ud2
    ret
gate_stub:                          # the handler of exception 6
    cmp qword ptr [rsp], offset gate
    jne exception_stubs + 6 * 16
    add qword ptr [rsp], 2
    cmp edi, 1
    jb gate_triple
    je gate_halt
    cmp edi, 3
    jb gate_rdmsr
    je gate_on
    cmp edi, 5
    je gate_cpuid
    and dword ptr [rsp + 16], ~0x200    # IF of the flags that iretq restores
    iretq
gate_on:
    or dword ptr [rsp + 16], 0x200
    iretq
gate_triple:
    lidt [no_idt_pointer]
    ud2
gate_halt:
    sti
    hlt
    cli
    iretq
gate_rdmsr:                         # esi = MSR; result in rax
    mov ecx, esi
    rdmsr
    shl rdx, 32
    mov eax, eax
    or rax, rdx
    iretq

gate_cpuid:                         # esi = leaf, the upper half of rsi = subleaf
    push rbx
    mov eax, esi
    mov rcx, rsi
    shr rcx, 32
    cpuid
    mov [cpuid_result], eax
    mov [cpuid_result + 4], ebx
    mov [cpuid_result + 8], ecx
    mov [cpuid_result + 12], edx
    pop rbx
    iretq

# --- Application processors: real mode to long mode, one record each, and answers to questions ---
# Copied to 0x60000 (SIPI vector 0x60); addresses inside are relative to that segment.
.globl trampoline, trampoline_end
.balign 16
.code16
trampoline:
    cli
    mov ax, cs
    mov ds, ax
    .byte 0x66, 0x0f, 0x01, 0x16    # lgdt, 32-bit base
    .word trampoline_gdt - trampoline
    mov eax, 0x620
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080
    mov eax, 0x100
    xor edx, edx
    wrmsr
    mov eax, 0x80000033
    mov cr0, eax
    .byte 0x66, 0xea                # ljmp 0x08:processor_long, 32-bit offset
    .long processor_long
    .word 0x08
trampoline_gdt:
    .word 0x37
    .long gdt
trampoline_end:
.code64
processor_long:
    mov eax, 1
    cpuid
    shr ebx, 24                     # initial APIC id
    mov edi, 1
    lock xadd dword ptr [processor_slots], edi
    cmp edi, 255
    ja processor_rest
    mov eax, ebx
    mov byte ptr [processor_ids + rdi], al
    cmp edi, 63
    ja processor_up
    mov r8d, edi                    # 256 bytes of answers a processor
    shl r8d, 8
    add r8d, offset processor_answers
    xor r9d, r9d
1:  cmp r9d, dword ptr [question_count]
    jae 2f
    mov eax, dword ptr [questions + r9 * 8]
    mov ecx, dword ptr [questions + r9 * 8 + 4]
    cpuid
    mov dword ptr [r8], eax
    mov dword ptr [r8 + 4], ebx
    mov dword ptr [r8 + 8], ecx
    mov dword ptr [r8 + 12], edx
    add r8d, 16
    inc r9d
    jmp 1b
2:  mov ecx, dword ptr [question_msr]
    test ecx, ecx
    jz processor_up
    rdmsr
    mov dword ptr [processor_msrs + rdi * 8], eax
    mov dword ptr [processor_msrs + rdi * 8 + 4], edx
processor_up:
    lock inc dword ptr [processors_up]
processor_rest:
    cli
    hlt
    jmp processor_rest

# --- Memory functions the compiler calls -------------------------------------------------------
.section .text.memory, "ax"
.globl memcpy, memmove, memset, memcmp, bcmp
memcpy:
    mov rax, rdi
    mov rcx, rdx
    rep movsb
    ret
memmove:
    mov rax, rdi
    mov rcx, rdx
    mov r8, rdi
    sub r8, rsi
    cmp r8, rdx                     # unsigned: does the target start inside the source?
    jb 1f
    rep movsb
    ret
1:  lea rdi, [rdi + rdx - 1]
    lea rsi, [rsi + rdx - 1]
    std
    rep movsb
    cld
    ret
memset:
    mov r8, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret
memcmp:
bcmp:
    xor eax, eax
    mov rcx, rdx
    cmp rcx, rcx                    # equal if there is nothing to compare
    repe cmpsb
    je 2f
    movzx eax, byte ptr [rdi - 1]
    movzx ecx, byte ptr [rsi - 1]
    sub ecx, eax
    mov eax, ecx
2:  ret

# --- Page tables in 2 MiB pages (PVM has no larger ones): the first GiB, and the fourth, where -----
# devices are. The others are filled in as needed: machine::map
.section .tables, "aw"
.globl pdpt
.balign 4096
pml4:
    .quad pdpt + 7                  # present, writable, user
    .fill 511, 8, 0
pdpt:
    .quad pd + 0x0007, 0, 0, pd + 0x1007
    .fill 508, 8, 0
pd:
.set entry, 0
.rept 512
    .quad (entry << 21) + 0x87
    .set entry, entry + 1
.endr
.set entry, 1536
.rept 512
    .quad (entry << 21) + 0x87
    .set entry, entry + 1
.endr

.balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # 0x08 code, 64-bit, level 0
    .quad 0x00cf93000000ffff        # 0x10 data, level 0
    .quad 0x00affb000000ffff        # 0x18 code, 64-bit, level 3
    .quad 0x00cff3000000ffff        # 0x20 data, level 3
gdt_task:
    .quad 0x0000890000000268        # 0x28 TSS; base filled in at the start
    .quad 0
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad idt
no_idt_pointer:
    .word 0
    .quad 0
.balign 16
task_state:
    .long 0
    .quad kernel_stack_top          # rsp0
    .fill 90, 1, 0
    .word 104                       # the I/O bitmap: ports 0 to 0xff7 are allowed
    .fill 512, 1, 0
    .byte 0xff

.section .bss
.balign 4096
.globl idt, fault_info, interrupt_count, processor_ids, processors_up, cpuid_result
.globl questions, question_count, question_msr, processor_answers, processor_msrs
idt:
    .skip 4096
    .skip 2048
kernel_stack_top:
    .skip 16384
user_stack_top:
fault_info:
    .skip 32
cpuid_result:
    .skip 16
interrupt_count:
    .skip 8
processor_slots:
    .skip 4
processors_up:
    .skip 4
processor_ids:
    .skip 256
question_count:                     # leaves of CPUID, up to 16
    .skip 4
question_msr:                       # 0 for none
    .skip 4
questions:                          # leaf and subleaf
    .skip 16 * 8
processor_answers:                  # of 64 processors: 16 times eax, ebx, ecx, edx
    .skip 64 * 256
processor_msrs:
    .skip 64 * 8
